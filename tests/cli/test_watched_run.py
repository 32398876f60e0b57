"""Runs of the train command that are watched: what is held out, answered, kept and reported."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rwkvpeft.checkpoints.adapter import load_recipe
from rwkvpeft.data.binidx import write_binidx

LORA = ("--peft", "lora", "--peft_config", '{"r": 2}', "--loss_mask", "qa", "--sample_tokens", "4")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    record = {"messages": [{"role": "user", "content": "Who barks?"}, {"role": "assistant", "content": "A dog."}]}
    path.write_text("\n".join([json.dumps("What is red?"), json.dumps({"prompt": "Two?"}), json.dumps(record)]))
    return path


@pytest.fixture
def different(tmp_path):
    """Conversations none of which is a copy of another, for a part of them to be held out."""
    texts = [f"User: Is {number} odd?\n\nAssistant: {('No', 'Yes')[number % 2]}.\0" for number in range(8)]
    write_binidx(tmp_path / "different", [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts])
    return tmp_path / "different"


def records(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]


def test_a_watched_run_leaves_evaluations_answers_the_best_checkpoint_and_a_report(
    train, tmp_path, prompts, different
):
    text = tmp_path / "general.txt"
    text.write_text("Text of quite another kind. " * 4)
    code, out, errors = train(
        *LORA, "--data_file", different, "--val_split", 2, "--val_steps", 1, "--sample_prompts", prompts,
        "--general_data_file", text, "--general_alarm", 0,
    )
    assert code == 0, errors
    found = records(tmp_path, "val_data.jsonl")
    assert [line["step"] for line in found] == [0, 1, 2]
    answers = records(tmp_path, "samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in answers[:3]] == [
        (0, "What is red?"), (0, "Two?"), (0, "Who barks?"),
    ]
    assert len(answers) == 9
    assert answers[2]["expected"] == "A dog."
    best = load_recipe(tmp_path / "out" / "rwkv-best.pth")
    assert best.val_loss == min(line["val_loss"] for line in found[1:])
    assert "held-out loss: base" in out
    assert "held out: 2 documents, " in out
    assert "general data: 1 document, 113 tokens, evaluated every step" in out
    report = (tmp_path / "out" / "report.md").read_text()
    for part in ("## Evaluations", "## Answers", "Who barks?", "`--val_split`", "Forgetting", "| torch |"):
        assert part in report


def test_without_prompts_those_of_held_out_conversations_are_asked_before_and_after(train, tmp_path, jsonl_file):
    code, _, errors = train(*LORA, "--val_data_file", jsonl_file)
    assert code == 0, errors
    answers = records(tmp_path, "samples.jsonl")
    assert [line["step"] for line in answers] == [0, 0, 0, 2, 2, 2]
    assert (answers[0]["prompt"], answers[0]["expected"]) == ("What is red?", "A colour.")


def test_a_run_that_is_not_watched_has_a_report_all_the_same_and_none_when_told_so(train, tmp_path):
    assert train("--report", "false")[0] == 0
    assert not (tmp_path / "out" / "report.md").exists()
    code, out, _ = train("--resume", "none")
    assert code == 0
    assert f"report    {tmp_path}/out/report.md" in out
    assert not (tmp_path / "out" / "val_data.jsonl").exists()


def test_without_matplotlib_the_report_has_tables_only(train, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkvpeft.cli.run_report.find_spec", lambda name: None)
    assert train()[0] == 0
    assert "pip install 'rwkvpeft[plot]'" in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "report").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--early_stop", "2"), "--early_stop needs held-out data"),
        (("--val_steps", "2"), "--val_steps has nothing to evaluate"),
        (("--val_split", "2.5"), "--val_split from 1 on is a number of documents"),
        (("--val_split", "0.1", "--val_data_file", "x.jsonl"), "both say what is held out"),
        (("--val_data_file", "gone.jsonl"), "--val_data_file: a file is missing"),
        (("--sample_prompts", "gone.jsonl"), "--sample_prompts names a file that does not exist"),
        (("--general_data_file", "gone.jsonl"), "--general_data_file: a file is missing"),
        (("--sample_tokens", "0"), "--sample_tokens is too small"),
        (("--sample_tokens", "9"), "--sample_tokens has nothing to answer"),
        (("--sample_tokens", "9", "--val_split", "2", "--report", "false"), "--sample_tokens has nothing to answer"),
        (("--general_alarm", "0.1"), "--general_alarm has no effect without --general_data_file"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_anything_is_written(train, tmp_path, words, message):
    code, _, errors = train(*words)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--dataload", "pack"),
        ("--dataload", "get"),
        ("--dataload", "only", "--micro_bsz", "1"),
        ("--infctx", "--chunk_ctx", "16"),
        ("--length_buckets",),
        ("--peft", "state"),
        ("--peft", "none"),
    ],
    ids=" ".join,
)
def test_every_way_of_rows_can_be_watched(train, tmp_path, different, words):
    code, _, errors = train("--data_file", different, "--val_split", 3, "--report", "false", *words)
    assert code == 0, errors
    losses = [line["val_loss"] for line in records(tmp_path, "val_data.jsonl")]
    # a random model of 256 tokens
    assert len(losses) == 2
    assert losses[0] == pytest.approx(5.545, abs=0.3)
    assert (tmp_path / "out" / "rwkv-best.pth").is_file()


def test_a_run_from_an_adapter_file_is_compared_with_the_base_without_it(train, tmp_path, different):
    words = ("--data_file", different, "--val_split", 2, "--report", "false", *LORA[:-2])
    assert train(*words, "--proj_dir", tmp_path / "first", "--lr_init", 1e-1, "--lr_final", 1e-1)[0] == 0
    first = (tmp_path / "first" / "val_data.jsonl").read_text().splitlines()
    code, _, errors = train(*words, "--adapter", tmp_path / "first" / "rwkv-0.pth")
    assert code == 0, errors
    assert records(tmp_path, "val_data.jsonl")[0]["val_loss"] == json.loads(first[0])["val_loss"]
    assert json.loads(first[-1])["val_loss"] != json.loads(first[0])["val_loss"]


def test_a_line_that_is_no_prompt_is_named(train, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"Fine?"\n\n7\n')
    code, _, errors = train("--sample_prompts", path)
    assert code == 2
    assert f"{path}:3: this is no prompt" in errors


def test_general_data_may_be_several_files_and_are_read_once(train, tmp_path, monkeypatch):
    from rwkvpeft.data import text

    opened = []
    read = text.read_text
    monkeypatch.setattr(text, "read_text", lambda path, encoding: opened.append(path) or read(path, encoding))
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, words in zip(paths, ("Short. ", "Longer than a row. " * 9), strict=True):
        path.write_text(words)
    code, _, errors = train("--report", "false", "--general_data_file", f"{paths[0]}:2,{paths[1]}")
    assert code == 0, errors
    assert opened == [str(path) for path in paths]
    assert records(tmp_path, "val_data.jsonl")[0]["general_loss"] == pytest.approx(5.545, abs=0.3)


def test_general_data_of_one_token_are_refused(train, tmp_path):
    (tmp_path / "general.jsonl").write_text('{"text": ""}\n')
    code, _, errors = train("--general_data_file", tmp_path / "general.jsonl")
    assert code == 2
    assert "general.jsonl is too short" in errors
    assert not (tmp_path / "out").exists()


def test_nothing_of_an_earlier_watched_run_is_in_the_report_of_one_that_is_not(train, tmp_path, prompts):
    (tmp_path / "held_out.jsonl").write_text('{"text": "Some more text."}\n')
    code, _, errors = train("--val_data_file", tmp_path / "held_out.jsonl", "--sample_prompts", prompts)
    assert code == 0, errors
    assert train("--resume", "none")[0] == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Evaluations" not in report
    assert "## Answers" not in report
