"""Optimizer groups against those of RWKV-LM."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
import torch
from torch import nn

from rwkvpeft.adapters.base import Rates
from rwkvpeft.training.parameter_groups import parameter_groups


def as_table(groups):
    """Names by factor and decay; groups that share both are one."""
    table = defaultdict(set)
    for group in groups:
        table[group["lr_scale"], group["weight_decay"]].update(group["names"])
    return {key: names for key, names in table.items() if names}


@pytest.mark.golden
@pytest.mark.parametrize(("version", "cases"), [(5, 8), (6, 8), (7, 2)])
def test_groups_are_those_of_rwkv_lm_in_every_stage(golden, version, cases):
    recorded = json.loads((golden / "param_groups.json").read_text())
    (entry,) = (e for e in recorded if e["version"] == version and e["tree"] == "pretrain")
    assert len(entry["cases"]) == cases
    parameters = [(name, nn.Parameter(torch.empty(shape))) for name, shape in entry["shapes"].items()]
    for case in entry["cases"]:
        ours = parameter_groups(
            parameters,
            layerwise_lr=bool(case["layerwise_lr"]),
            weight_decay=case["weight_decay"],
            train_stage=case["my_pile_stage"],
        )
        assert as_table(ours) == as_table(case["groups"])


def test_v7_has_no_factors_of_its_own_in_stage_2():
    names = ("blocks.0.att.w0", "blocks.0.att.x_k", "blocks.0.att.r_k")
    parameters = [(name, nn.Parameter(torch.empty(2, 2))) for name in names]
    groups = [parameter_groups(parameters, layerwise_lr=True, weight_decay=0.0, train_stage=stage) for stage in (2, 3)]
    assert as_table(groups[0]) == as_table(groups[1]) == {(2.0, 0.0): {names[0]}, (1.0, 0.0): {names[1], names[2]}}


def test_without_layerwise_rates_all_learn_alike():
    shapes = {"blocks.0.att.w0": (1, 1, 4), "emb.weight": (4, 4)}
    parameters = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    groups = parameter_groups(parameters, layerwise_lr=False, weight_decay=0.1)
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_adapter_tensors_are_not_decayed_and_frozen_ones_left_out():
    frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    parameters = [
        ("blocks.0.att.key.base.weight", frozen),
        ("blocks.0.att.key.lora_A", nn.Parameter(torch.ones(2, 4))),
        ("blocks.0.att.time_state", nn.Parameter(torch.ones(2, 4, 4))),
    ]
    (group,) = parameter_groups(parameters, layerwise_lr=True, weight_decay=0.1)
    assert group["names"] == ["blocks.0.att.key.lora_A", "blocks.0.att.time_state"]
    assert (group["lr_scale"], group["weight_decay"]) == (1.0, 0.0)


def test_own_rates_and_decay_make_groups_of_their_own():
    table = {"a.lora_A": Rates(lr_init=1e-3), "b.lora_A": Rates(weight_decay=0.2), "c.weight": Rates(weight_decay=0.0)}
    parameters = [(name, nn.Parameter(torch.ones(4, 4))) for name in (*table, "d.lora_A", "e.weight")]
    groups = parameter_groups(parameters, layerwise_lr=True, weight_decay=0.1, rates=table.get)
    settings = {
        group["names"][0]: (group["lr_init"], group["lr_final"], group["weight_decay"], group["own_decay"])
        for group in groups
    }
    assert settings == {
        "a.lora_A": (1e-3, None, 0.0, False),
        "b.lora_A": (None, None, 0.2, True),
        "c.weight": (None, None, 0.0, True),
        "d.lora_A": (None, None, 0.0, False),
        "e.weight": (None, None, 0.1, False),
    }
