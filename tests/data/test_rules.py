"""What --loss_mask and --mask_think train of finished text, and of records whose roles are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.binidx import BinidxSource, write_binidx
from rwkvpeft.data.records import JsonlSource, open_jsonl
from rwkvpeft.data.rules import mask_rule
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError

TEXTS = [
    "User: a\n\nAssistant: <think>b</think>c\n\nUser: d\n\nAssistant: e",
    "User: a\n\nAssistant: <think>b\n\nUser: c",
    "no turns, <think>but thoughts</think> all the same",
    "User: a",
]
SETTINGS = [{"loss_mask": mask, "mask_think": think} for mask in ("none", "qa", "last") for think in (False, True)]


@pytest.fixture
def sources(tmp_path):
    """The same documents with voices and without."""
    tokenizer = load_tokenizer("bytes")
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    write_binidx(tmp_path / "in", [[*tokenizer.encode(text), 0] for text in TEXTS])
    return JsonlSource(tmp_path / "in.jsonl", tokenizer), BinidxSource(tmp_path / "in")


def trained_text(source, index, **settings):
    rule = mask_rule(DataConfig(tokenizer="bytes", **settings))
    tokens = source.read(index)
    kept = tokens[rule.weights(source, index, len(tokens)) > 0]
    return bytes(kept.astype(np.uint8)).decode().replace("\0", "<0>")


@pytest.mark.parametrize(
    ("index", "settings", "expected"),
    [
        (0, {"loss_mask": "last"}, " e<0>"),
        (0, {"loss_mask": "qa", "mask_think": True}, " <think></think>c\n\n e<0>"),
        (1, {"loss_mask": "last"}, " <think>b\n\n"),
        (1, {"loss_mask": "qa", "mask_think": True}, " <think>\n\n"),
        (1, {"loss_mask": "none", "mask_think": True}, "User: a\n\nAssistant: <think>\n\nUser: c<0>"),
        (2, {"loss_mask": "qa", "mask_think": True}, ""),
        (2, {"loss_mask": "none", "mask_think": True}, "no turns, <think></think> all the same<0>"),
    ],
)
def test_the_text_of_a_finished_document_tells_what_is_trained(sources, index, settings, expected):
    assert trained_text(sources[1], index, **settings) == expected


@pytest.mark.parametrize("settings", SETTINGS)
def test_voices_and_text_tell_the_same_of_conversations(sources, settings):
    for index in (0, 1, 3):
        assert trained_text(sources[0], index, **settings) == trained_text(sources[1], index, **settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_counts_are_those_of_the_weights(sources, settings):
    rule = mask_rule(DataConfig(tokenizer="bytes", **settings))
    for source in sources:
        lengths = [size - 1 for size in source.sizes.tolist()]
        one_by_one = [np.count_nonzero(rule.weights(source, i, n)[1:]) for i, n in enumerate(lengths)]
        assert rule.count(source, lengths) == one_by_one


def test_the_last_answer_is_the_last_of_the_document_though_it_lies_behind_the_cut(sources):
    rule = mask_rule(DataConfig(tokenizer="bytes", loss_mask="last"))
    for source in sources:
        assert not rule.weights(source, 0, 20).any()


def test_thoughts_between_markers_are_left_out_too(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a [b<think>c</think>d] e"}))
    source = JsonlSource(tmp_path / "in.jsonl", load_tokenizer("bytes"))
    markers = {"mask0": "[", "mask1": "]"}
    assert trained_text(source, 0, loss_mask="se", mask_id=markers, mask_think=True) == "b<think></think>d"


@pytest.mark.parametrize("turn", [{"weight": 0.5}, {"train": False}])
def test_weights_of_turns_are_refused_where_nothing_goes_by_turns(tmp_path, turn):
    record = {"messages": [{"role": "assistant", "content": "a", **turn}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    config = {"data_file": str(tmp_path / "in.jsonl"), "data_type": "jsonl", "tokenizer": "bytes"}
    assert len(open_jsonl(DataConfig(loss_mask="qa", **config))) == 1
    with pytest.raises(UserError, match="--loss_mask none does not go by turns"):
        open_jsonl(DataConfig(loss_mask="none", **config))


def test_too_many_different_weights_are_refused(tmp_path):
    turns = [{"role": "assistant", "content": "a", "weight": i / 1000} for i in range(300)]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match=r"in.jsonl:1: too many different"):
        JsonlSource(tmp_path / "in.jsonl", load_tokenizer("bytes"))
