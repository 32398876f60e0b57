"""Conversion in several processes."""

from __future__ import annotations

import json
import os
import threading

import pytest

from rwkvpeft.data import parallel as module
from rwkvpeft.data.binidx import BinidxSource
from rwkvpeft.data.convert import Conversion, convert
from rwkvpeft.data.jsonl import blocks
from rwkvpeft.errors import UserError


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "blocks", lambda path: blocks(path, 64))


def job(folder, **changes):
    texts = [f"text {i} " * (i % 7) for i in range(40)]
    (folder / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = {"path": folder / "in.jsonl", "prefix": folder / "out", "epochs": 2, "seed": 3, "tokenizer": "bytes"}
    return Conversion(**{**settings, **changes})


def convert_to(folder, **changes):
    convert(job(folder, **changes), lambda progress: None)
    return (folder / "out.bin").read_bytes(), (folder / "out.idx").read_bytes()


def test_blocks_and_workers_change_nothing(tmp_path, small_blocks):
    assert convert_to(tmp_path, workers=2) == convert_to(tmp_path, workers=1)


@pytest.mark.slow
def test_a_program_with_threads_starts_fresh_workers(tmp_path, small_blocks):
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        threaded = convert_to(tmp_path, workers=2)
    finally:
        done.set()
        thread.join()
    assert threaded == convert_to(tmp_path, workers=1)


def test_line_numbers_count_through_all_blocks(tmp_path, small_blocks):
    conversion = job(tmp_path, workers=2)
    lines = conversion.path.read_text().splitlines()
    lines[30] = "[]"
    conversion.path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"in.jsonl:31: not a JSON object"):
        convert(conversion, lambda progress: None)


def test_a_worker_that_dies_is_reported(tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(module, "tokenise_block", die)
    with pytest.raises(UserError, match="ended without a word"):
        convert(job(tmp_path, workers=2), lambda progress: None)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def die(*arguments, **more):
    os._exit(9)


def test_progress_ends_at_the_whole_of_both_stages(tmp_path):
    seen = {}
    convert(job(tmp_path), lambda progress: seen.update({progress.stage: progress}))
    assert list(seen) == ["tokenise", "write"]
    assert all(progress.done == progress.total for progress in seen.values())
    assert seen["write"].tokens == BinidxSource(tmp_path / "out").n_tokens == 2 * seen["tokenise"].tokens


def test_a_vocabulary_too_large_for_the_format_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("70000 'a' 1\n")
    with pytest.raises(UserError, match="16 bits"):
        convert(job(tmp_path, tokenizer=str(tmp_path / "vocab.txt")), lambda progress: None)
