"""The mask beside binidx: what it carries over, and when it is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from rwkvpeft.cli.make_data import main
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.binidx import BinidxSource, open_binidx
from rwkvpeft.data.records import JsonlSource
from rwkvpeft.data.rules import mask_rule
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError

RECORDS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * i, "weight": i / 4}]}
    for i in range(1, 9)
]


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return tmp_path


def make(*flags):
    return main(["in.jsonl", "2", "16", "--seed", "3", "--tokenizer", "bytes", *flags])


def weights(source, **settings):
    rule = mask_rule(DataConfig(tokenizer="bytes", **settings))
    return {
        (bytes(source.read(i).astype(np.uint8)), tuple(rule.weights(source, i, int(size)).tolist()))
        for i, size in enumerate(source.sizes)
    }


def test_roles_and_weights_survive_binidx_in_any_order(folder):
    assert make("--mask") == 0
    source = open_binidx(DataConfig(data_file="in", loss_mask="qa"))
    assert len(source) == 16
    assert weights(source, loss_mask="qa") == weights(
        JsonlSource("in.jsonl", load_tokenizer("bytes")), loss_mask="qa"
    )
    assert "in.mask" in source.notes[0]


def test_the_pair_is_the_same_with_a_mask_and_without(folder):
    assert make("--output", "one") == make("--output", "two", "--mask") == 0
    for suffix in (".bin", ".idx"):
        assert (folder / f"one{suffix}").read_bytes() == (folder / f"two{suffix}").read_bytes()
    assert not (folder / "one.mask").exists()


def test_the_mask_is_read_only_where_the_settings_go_by_it(folder):
    make("--mask")
    assert open_binidx(DataConfig(data_file="in", loss_mask="none")).spoken(0) is None
    assert open_binidx(DataConfig(data_file="in", loss_mask="none", mask_think=True)).spoken(0) is not None


def test_a_source_with_a_mask_can_be_handed_to_a_worker(folder):
    make("--mask")
    source = BinidxSource("in", with_mask=True)
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.spoken(3).codes, source.spoken(3).codes)


def test_a_mask_of_other_tokens_is_refused(folder):
    make("--mask")
    stale = (folder / "in.mask").read_bytes()
    assert main(["in.jsonl", "2", "16", "--seed", "4", "--tokenizer", "bytes"]) == 0
    assert not (folder / "in.mask").exists()
    (folder / "in.mask").write_bytes(stale)
    with pytest.raises(UserError, match="belongs to other tokens"):
        open_binidx(DataConfig(data_file="in", loss_mask="qa"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"X" + content[1:],
        lambda content: content[:-4],
        lambda content: content[:40],
        lambda content: content[:16] + b"\xff" + content[17:],
        lambda content: content[:8] + b"\xff" * 8 + content[16:],
        lambda content: content.replace(b"0.25", b"-.25"),
    ],
)
def test_a_damaged_mask_is_refused(folder, damage):
    make("--mask")
    (folder / "in.mask").write_bytes(damage((folder / "in.mask").read_bytes()))
    with pytest.raises(UserError, match="is no mask, or damaged"):
        open_binidx(DataConfig(data_file="in", loss_mask="qa"))


def test_a_bad_line_leaves_the_older_files(folder):
    make("--mask")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "in.jsonl").write_text("nonsense")
    assert make("--mask") == 2
    (folder / "in.jsonl").write_bytes(before["in.jsonl"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_is_told_of_a_mask_that_it_does_not_go_by(folder):
    assert make("--mask") == 0
    assert open_binidx(DataConfig(data_file="in", loss_mask="none")).notes == (
        "in.mask is not read: --loss_mask none does not go by turns",
    )
