"""--check of preference data and of prompts."""

from __future__ import annotations

import json

import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.check_records import check_pairs, check_prompts
from rwkvpeft.data.check_report import render

PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "five"}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return DataConfig(data_file=str(path), tokenizer="bytes", ctx_len=40)


def places(config, found, name):
    return [place.replace(config.data_file, "") for place in found.examples.get(name, [])]


@pytest.fixture
def tricky(tmp_path):
    return write(
        tmp_path / "in.jsonl",
        PAIR,
        "nonsense",
        {**PAIR, "chosen": ""},
        {**PAIR, "rejected": "4"},
        PAIR,
        {**PAIR, "prompt": "a" * 40},
        {**PAIR, "chosen": "<think>4"},
        {**PAIR, "rejected": "5" * 40},
        {"prompt": "2+2?", "completion": "4", "label": True},
    )


def test_every_kind_of_trouble_with_pairs_is_counted_and_placed(tricky):
    found = check_pairs(tricky, answers=2)
    assert found.lengths().tolist() == [28, 28, 64, 32, 64]
    assert places(tricky, found, "duplicates") == [":5 = :1"]
    assert places(tricky, found, "untrained") == [":6"]
    assert places(tricky, found, "cut") == [":6", ":8"]
    assert places(tricky, found, "open_thoughts") == [":7"]
    assert [line.removeprefix(tricky.data_file).partition(" ")[0] for line in found.bad] == [":2:", ":3:", ":9:"]
    assert found.notes[0].endswith(f"{tricky.data_file}:4")
    # " 4" and " five" with their ends, three times but once with a tag more and once cut to 19
    assert found.trained == (3 + 6) * 2 + (10 + 6) + (3 + 19)
    assert not found.is_fine


def test_for_kto_single_answers_are_read(tricky):
    assert len(check_pairs(tricky, answers=3).bad) == 2


def test_pairs_without_trouble_are_fine(tmp_path):
    found = check_pairs(write(tmp_path / "in.jsonl", PAIR), answers=2)
    assert found.is_fine
    assert "trained: 9 tokens" in render(found)


def test_a_file_of_bad_lines_alone_holds_nothing(tmp_path):
    for check in (lambda config: check_pairs(config, 3), check_prompts):
        found = check(write(tmp_path / "in.jsonl", "nonsense", {"other": "a"}))
        assert not found.is_fine
        assert "2 bad lines" in render(found)


def test_a_file_of_identical_answers_alone_says_so(tmp_path):
    found = check_pairs(write(tmp_path / "in.jsonl", {**PAIR, "rejected": PAIR["chosen"]}), answers=2)
    assert "chosen and rejected being the same" in render(found)


def test_prompts_are_counted_and_those_that_are_too_long_placed(tmp_path):
    config = write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "a" * 40}, {"prompt": "a"}, {"answer": "b"})
    found = check_prompts(config)
    assert places(config, found, "too_long") == [":2"]
    assert places(config, found, "duplicates") == [":3 = :1"]
    assert "trained" not in render(found)
    assert [line.partition(": ")[2].partition(";")[0] for line in found.bad] == ["no prompt in this record"]


def test_prompts_that_fit_are_fine(tmp_path):
    assert check_prompts(write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "a" * 40})).is_fine
    found = check_prompts(write(tmp_path / "long.jsonl", {"prompt": "a" * 40}))
    assert not found.is_fine
    assert "every prompt is longer than --ctx_len" in render(found)
