"""--check: every count, where it is, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data import parallel
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.data.check import check_data
from rwkvpeft.data.check_report import render, write_picture
from rwkvpeft.data.jsonl import blocks
from rwkvpeft.errors import UserError


def write(path, *texts):
    path.write_text("\n".join(json.dumps({"text": text}) if isinstance(text, str) else text[0] for text in texts))
    return str(path)


def check(path, **settings):
    return check_data(DataConfig(**{"data_file": path, "tokenizer": "bytes", "ctx_len": 40, **settings}))


@pytest.fixture
def tricky(tmp_path):
    return write(
        tmp_path / "in.jsonl",
        "User: a\n\nAssistant: b",
        "User: a\n\nAssistant: " + "b" * 40,
        ("nonsense",),
        "Assistant: <think>b",
        "",
        "Assistant: b</think>",
        "User: a\n\nAssistant: b",
        ('{"messages": []}',),
        "User: " + "a" * 60,
    )


def test_every_kind_of_trouble_is_counted_and_placed(tricky):
    found = check(tricky, loss_mask="qa")
    assert found.lengths().tolist() == [22, 61, 20, 1, 21, 22, 67]
    counts = {"untrained": 2, "cut": 2, "cut_answers": 1, "open_thoughts": 1, "stray_ends": 1, "duplicates": 1}
    assert {name: getattr(found, name) for name in counts} == counts
    lines = {name: [place.removeprefix(f"{tricky}:") for place in places] for name, places in found.examples.items()}
    assert lines == {
        "untrained": ["5", "9"],
        "cut": ["2", "9"],
        "cut_answers": ["2"],
        "open_thoughts": ["4"],
        "stray_ends": ["6"],
        "duplicates": [f"7 = {tricky}:1"],
    }


def test_all_bad_lines_are_found(tricky):
    found = check(tricky)
    assert [line.removeprefix(tricky).partition(" ")[0] for line in found.bad] == [":3:", ":8:"]
    assert not found.is_fine


def test_trained_tokens_are_those_within_rows(tricky):
    # " b", its end, 21 of the long answer's tokens, " <think>b", " b</think>" with their ends, " b" and its end
    assert check(tricky, loss_mask="qa").trained == 3 + 22 + 10 + 11 + 3


def test_blocks_change_nothing(tricky, monkeypatch):
    whole = check(tricky, loss_mask="qa")
    monkeypatch.setattr(parallel, "blocks", lambda path: blocks(path, 50))
    parts = check(tricky, loss_mask="qa")
    assert render(parts) == render(whole)


def test_windows_cut_no_ending(tricky):
    assert check(tricky, dataload="get").cut == 0


def test_binidx_and_several_files_are_read_as_a_run_reads_them(tmp_path):
    write_binidx(tmp_path / "b", [[65, 0], [66, 67, 0]])
    found = check(f"{tmp_path / 'b'}:3,{write(tmp_path / 'a.jsonl', 'A', 'D')}:1")
    assert found.lengths().tolist() == [2, 3, 2, 2]
    assert found.examples["duplicates"] == [f"{tmp_path / 'a.jsonl'}:1 = document 0 of {tmp_path / 'b'}"]


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    write_binidx(tmp_path / "b", [[300, 0]])
    with pytest.raises(UserError, match="document 0, position 0"):
        check(str(tmp_path / "b"))


def test_progress_ends_at_the_whole_file(tricky):
    seen = []
    check_data(DataConfig(data_file=tricky, tokenizer="bytes", ctx_len=8), seen.append)
    assert seen[-1].done == seen[-1].total == Path(tricky).stat().st_size


def test_the_report_tells_numbers_bars_notes_and_bad_lines(tricky):
    lines = render(check(tricky, loss_mask="qa")).splitlines()
    assert lines[:3] == [
        "data: 7 documents, 214 tokens",
        "trained: 49 tokens, 22.9 %",
        "lengths: 1 to 67 tokens, half of them up to 22, 95 % up to 65",
    ]
    assert f"  up to  32 |{'#' * 40}| 4" in lines
    assert f"  up to 128 |{'#' * 10}{' ' * 30}| 1  cut by --ctx_len" in lines
    assert any(line.startswith("note: 1 document (14.3 %) with a <think> that is never closed: ") for line in lines)
    assert lines[-3] == "error: 2 bad lines"


def test_no_more_than_twenty_bad_lines_are_shown(tmp_path):
    shown = render(check(write(tmp_path / "in.jsonl", *[("x",)] * 30))).splitlines()
    assert shown[0] == "data: no document"
    assert len(shown) == 24
    assert shown[-1] == "  and 10 more"


def test_a_file_without_documents_is_an_error(tmp_path):
    shown = render(check(write(tmp_path / "in.jsonl"))).splitlines()
    assert shown == ["data: no document", "error: there is nothing to train on"]


def test_the_lengths_are_drawn(tricky, tmp_path):
    pytest.importorskip("matplotlib")
    assert write_picture(check(tricky), tmp_path / "new" / "lengths.png")
    assert (tmp_path / "new" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_are_counted_in_the_bar_that_names_them(tmp_path):
    write_binidx(tmp_path / "b", [np.ones(size, dtype=int) for size in (1, 2, 3, 4, 5)])
    bars = [line for line in render(check(str(tmp_path / "b"))).splitlines() if "|" in line]
    assert [bar.rpartition("| ")[2] for bar in bars] == ["1", "1", "2", "1"]


def test_what_a_run_would_refuse_is_told(tmp_path):
    turn = {"role": "assistant", "content": "a", "weight": 0.5}
    path = write(tmp_path / "in.jsonl", (json.dumps({"messages": [turn]}),))
    assert check(path, loss_mask="qa").is_fine
    found = check(path, loss_mask="none")
    assert not found.is_fine
    assert "does not go by turns" in render(found).splitlines()[-1]


def test_data_without_anything_to_train_are_not_fine(tmp_path):
    found = check(write(tmp_path / "in.jsonl", "User: a"), loss_mask="qa")
    assert not found.is_fine
    assert render(found).splitlines()[-1] == "error: nothing would be trained with these settings"
