"""``train.py --check`` and ``--preview`` of chats, as a user runs them."""

from __future__ import annotations

import json

import pytest

from rwkvpeft.cli.make_data import main as make_data
from rwkvpeft.cli.train import main

RECORD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(json.dumps(RECORD))
    return tmp_path


def check(*flags):
    return main(["--check", "--tokenizer", "bytes", "--accelerator", "cpu", *flags])


def test_a_report_needs_no_model_and_a_good_file_ends_well(folder, capsys):
    assert check("--data_file", "in.jsonl", "--loss_mask", "qa") == 0
    assert "data: 1 document, 22 tokens\ntrained: 3 tokens, 13.6 %\n" in capsys.readouterr().out


def test_bad_lines_end_in_exit_code_2(folder, capsys):
    (folder / "in.jsonl").write_text('nonsense\n{"text": "a"}\n')
    assert check("--data_file", "in.jsonl") == 2
    output = capsys.readouterr()
    assert "in.jsonl:1: not valid JSON" in output.out
    assert output.err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "no data are given"),
        (("--data_file", "nowhere.jsonl"), "a file is missing"),
        (("--data_file", "in.jsonl", "--preview", "1"), "--check and --preview"),
    ],
)
def test_a_users_mistake_gives_one_message(folder, capsys, flags, message):
    assert check(*flags) == 2
    assert message in capsys.readouterr().err


def test_a_mask_is_taken_and_told(folder, capsys):
    make_data(["in.jsonl", "2", "8", "--mask", "--tokenizer", "bytes", "--seed", "1"])
    assert check("--data_file", "in", "--loss_mask", "qa") == 0
    assert "note: who says each token is read from in.mask" in capsys.readouterr().out


def test_a_preview_of_binidx_with_a_mask_shows_what_the_roles_train(folder, tiny_model, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    (folder / "in.jsonl").write_text(json.dumps({"messages": [*turns, *RECORD["messages"]]}))
    make_data(["in.jsonl", "1", "8", "--mask", "--tokenizer", "bytes", "--seed", "1"])
    capsys.readouterr()
    arguments = ["--load_model", str(tiny_model), "--data_file", "in", "--tokenizer", "bytes", "--accelerator", "cpu"]
    assert main([*arguments, "--loss_mask", "qa", "--preview", "1", "--ctx_len", "64"]) == 0
    output = capsys.readouterr().out
    assert "User: a\n\nAssistant: b\n\nUser: a\n\nAssistant:⟦ b<end>⟧" in output
    assert "note: who says each token is read from in.mask" in output
