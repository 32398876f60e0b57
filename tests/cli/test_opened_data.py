"""Which rows a run opens for its objective, and what --check and --preview make of them."""

from __future__ import annotations

import json

import pytest

from rwkvpeft.cli import train
from rwkvpeft.cli.watch import open_training_data
from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.data.pairs import PairRows
from rwkvpeft.data.prompt_rows import PromptRows, record_of
from rwkvpeft.data.rows import DocumentRows

PAIRS = [{"prompt": f"{n}+{n}?", "chosen": str(2 * n), "rejected": str(2 * n + 1)} for n in range(1, 7)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PAIRS))
    return path


def words(file, objective, more=""):
    reward = "--reward rewards.py:right" if objective == "grpo" else ""
    return f"--objective {objective} {reward} --data_file {file} --tokenizer bytes --ctx_len 64 {more}".split()


def opened(file, objective, more=""):
    given = parse_train(["--load_model", "m.pth", *words(file, objective, more)])
    return open_training_data(resolve(given, Machine("cpu", has_bf16=True))[0], vocab_size=256)


@pytest.mark.parametrize(("objective", "answers"), [("dpo", 2), ("orpo", 2), ("kto", 3)])
def test_preferences_read_pairs(file, objective, answers):
    rows, held_out = opened(file, objective, "--val_split 2")
    assert isinstance(rows, PairRows)
    assert isinstance(held_out, PairRows)
    assert (len(rows), len(held_out)) == (4, 2)
    assert len(rows.row(0).lengths) == len(held_out.row(0).lengths) == 1 + answers


def test_rewards_read_prompts_and_tell_held_out_ones_apart(file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "other"}\n')
    rows, held_out = opened(file, "grpo", f"--val_data_file {other}")
    assert isinstance(rows, PromptRows)
    assert isinstance(held_out, PromptRows)
    number = int(held_out.row(0).beside["document"][0])
    assert record_of([rows, held_out], number)["prompt"] == "other"


def test_held_out_prompts_may_be_a_share(file):
    rows, held_out = opened(file, "grpo", "--val_split 2")
    assert (len(rows), len(held_out)) == (4, 2)


def test_language_modelling_reads_documents(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n')
    assert isinstance(opened(path, "language_modelling")[0], DocumentRows)


@pytest.mark.parametrize(("objective", "told"), [
    # answers of 3 or 4 bytes with their ends, twelve of them
    ("dpo", "trained: 40 tokens"), ("kto", "trained: 40 tokens"), ("grpo", "data: 6 documents, 132 tokens")])
def test_check_reads_what_the_objective_reads(file, tmp_path, capsys, objective, told):
    assert train.main([*words(file, objective), "--check", "1", "--proj_dir", str(tmp_path)]) == 0
    assert told in capsys.readouterr().out


def test_check_finds_what_is_no_pair(file, tmp_path, capsys):
    file.write_text(file.read_text() + '{"text": "a"}\n')
    assert train.main([*words(file, "dpo"), "--check", "1", "--proj_dir", str(tmp_path)]) == 2
    assert f"{file}:7: no pair of answers in this record" in capsys.readouterr().out
