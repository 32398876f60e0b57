"""MiSS's shard and Bat's blocks, against their definitions element by element."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rwkvpeft.adapters.miss import BatAdapter, BatLinear, MissAdapter, MissLinear
from rwkvpeft.errors import UserError


@pytest.mark.parametrize(("rank", "columns"), [(4, 10), (5, 10), (12, 10), (20, 10), (4, 5), (5, 2)])
def test_miss_adds_a_shard_to_every_column_block_the_last_cut_short(rank, columns):
    base = nn.Linear(12, 10, bias=False)
    layer = MissLinear(base, rank, columns)
    nn.init.normal_(layer.miss)
    weight = torch.empty(10, 12)
    for o in range(10):
        for i in range(12):
            weight[o, i] = base.weight[o, i] + layer.miss[i % rank, o % columns]
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=1e-5)
    merged = MissAdapter().merge("k.weight", base.weight.detach().clone(), {"k.miss": layer.miss.detach()})
    torch.testing.assert_close(merged, weight, rtol=0, atol=1e-6)


def test_bat_multiplies_each_block_of_the_weight_by_its_columns_block():
    base = nn.Linear(12, 8, bias=False)
    layer = BatLinear(base, 4)
    nn.init.normal_(layer.miss)
    weight = base.weight.detach().clone()
    for a in range(2):
        for b in range(3):
            block = base.weight[4 * a : 4 * a + 4, 4 * b : 4 * b + 4]
            weight[4 * a : 4 * a + 4, 4 * b : 4 * b + 4] = block + block @ layer.miss[b] + layer.miss[b]
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=1e-4)
    merged = BatAdapter().merge("k.weight", base.weight.detach().clone(), {"k.miss": layer.miss.detach()})
    torch.testing.assert_close(merged, weight.detach(), rtol=0, atol=1e-5)


def test_gradients_of_the_shard_are_those_of_the_merged_weight():
    base = nn.Linear(12, 10, bias=False).double().requires_grad_(False)
    for layer in (MissLinear(base, 5, 10), BatLinear(base, 2)):
        layer.double()
        nn.init.normal_(layer.miss)
        assert torch.autograd.gradcheck(layer, torch.randn(2, 12, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("name", ["disha", "bone", "miss"])
def test_other_names_of_the_shard_are_read(name):
    tensors = {f"blocks.0.att.key.{name}": torch.zeros(4, 8)}
    assert list(MissAdapter().rename(tensors)) == ["blocks.0.att.key.miss"]
    assert MissAdapter.recognises(tensors)
    assert not BatAdapter.recognises(tensors)


def test_bats_blocks_must_divide_both_sizes():
    with pytest.raises(UserError, match="does not divide"):
        BatAdapter.from_settings({"r": 8}).make_layer("blocks.0.att.key", nn.Linear(16, 12, bias=False))


def test_the_mini_form_must_divide_the_outputs():
    with pytest.raises(UserError, match="mini_r"):
        MissAdapter.from_settings({"r": 8, "mini_r": 5}).make_layer("blocks.0.att.key", nn.Linear(16, 12, bias=False))


def test_a_shard_of_another_size_is_refused_when_merging():
    with pytest.raises(UserError, match="does not fit"):
        MissAdapter().changes("k.weight", (8, 12), {"k.miss": torch.zeros(4, 7)})


@pytest.mark.parametrize("start", ["bat", False])
def test_starts_of_hugging_face_that_we_do_not_share_are_refused(start):
    with pytest.raises(UserError):
        MissAdapter.from_settings({"init_weights": start})
