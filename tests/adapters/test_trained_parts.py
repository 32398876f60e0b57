"""Which base parameters --train_parts selects."""

from __future__ import annotations

import json

import pytest

from rwkvpeft.adapters.trained_parts import PARTS, TrainedParts
from rwkvpeft.errors import UserError

SELECTED = {
    "blocks.1.att.time_decay": "time",
    "blocks.1.att.time_maa_w1": "time",
    "blocks.1.ffn.time_mix_k": "time",
    "blocks.1.att.x_r": "time",
    "blocks.1.ffn.x_k": "time",
    "blocks.1.att.w0": "time",
    "blocks.1.att.v2": "time",
    "blocks.1.att.k_k": "time",
    "blocks.1.att.r_k": "time",
    "blocks.0.ln0.weight": "ln",
    "blocks.1.att.ln_x.bias": "ln",
    "ln_out.weight": "ln",
    "emb.weight": "emb",
    "head.weight": "head",
    "blocks.1.att.g1": None,
    "blocks.1.att.time_state": None,
    "blocks.1.att.key.weight": None,
    "blocks.0.att.v0": None,
}


@pytest.mark.parametrize(("name", "part"), SELECTED.items())
def test_each_parameter_belongs_to_one_part_or_none(name, part):
    assert [candidate for candidate in PARTS if TrainedParts([candidate]).includes(name)] == ([part] if part else [])


@pytest.mark.golden
@pytest.mark.parametrize("version", [5, 6])
def test_time_and_ln_select_what_those_words_select_upstream(golden, version):
    groups = json.loads((golden / "param_groups.json").read_text())
    names = next(list(group["shapes"]) for group in groups if group["version"] == version)
    for part in ("time", "ln"):
        chosen = TrainedParts([part])
        assert [name for name in names if chosen.includes(name)] == [name for name in names if part in name]


def test_none_trains_nothing_and_an_unknown_part_is_refused():
    assert not TrainedParts(["none"]).includes("head.weight")
    with pytest.raises(UserError, match="emb"):
        TrainedParts(["embedding"])
