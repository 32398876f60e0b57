"""LoRA: what it wraps, its settings, its merge rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rwkvpeft.adapters.lora import LoraAdapter, LoraLinear
from rwkvpeft.adapters.settings import LoraConfig
from rwkvpeft.errors import UserError


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(6, 10, bias=False)
        self.value = nn.Linear(6, 10, bias=False)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(4, 6)
        self.head = nn.Linear(6, 4, bias=False)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.att, block.ffn = Attention(), Attention()
            self.blocks.append(block)


def adapted(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, LoraLinear)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, 8),
        (["key"], 4),
        (["att.key"], 2),
        (["blocks.1.ffn.value", "att.key"], 3),
        ("key,value", 8),
    ],
)
def test_targets_are_ends_of_paths(targets, expected):
    model = Blocks()
    LoraAdapter(LoraConfig(r=4, target_modules=targets)).attach(model)
    assert len(adapted(model)) == expected


@pytest.mark.parametrize("target", ["gate", "y", "att"])
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(target):
    with pytest.raises(UserError, match=r"att\.key"):
        LoraAdapter(LoraConfig(target_modules=["key", target])).attach(Blocks())


def test_initial_factors_are_kaiming_uniform_and_zero():
    layer = LoraLinear(nn.Linear(400, 10, bias=False), 16, 2.0)
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert layer.lora_B.abs().max() == 0


def test_dropout_acts_in_training_only():
    layer = LoraLinear(nn.Linear(64, 8, bias=False), 8, 4.0, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 64)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def test_merged_weights_compute_what_the_adapter_computes():
    base = nn.Linear(24, 40, bias=False)
    layer = LoraLinear(base, 5, 13 / 5).eval()
    nn.init.normal_(layer.lora_B)
    tensors = {"k.lora_A": layer.lora_A.detach(), "k.lora_B": layer.lora_B.detach()}
    merged = LoraAdapter(LoraConfig(r=5, lora_alpha=13)).merge("k.weight", base.weight.detach(), tensors)
    x = torch.randn(7, 24)
    torch.testing.assert_close(x @ merged.T, layer(x), rtol=0, atol=2e-5)


def test_half_an_adapter_is_refused():
    with pytest.raises(UserError, match="partner"):
        LoraAdapter().merge("k.weight", torch.zeros(4, 4), {"k.lora_A": torch.zeros(2, 4)})


@pytest.mark.parametrize(
    "settings", [{"r": 0}, {"r": 2.5}, {"r": "8"}, {"alpha": -1}, {"dropout": 1.0}, {"lora_alpha": "x"}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="cannot be used"):
        LoraAdapter.from_settings(settings)


def test_short_names_of_alpha_and_dropout_are_understood():
    config = LoraAdapter.from_settings({"r": 4, "alpha": 16, "dropout": 0.1}).config
    assert (config.r, config.lora_alpha, config.lora_dropout, config.scaling(4)) == (4, 16, 0.1, 4)
    with pytest.raises(UserError, match="twice"):
        LoraAdapter.from_settings({"alpha": 16, "lora_alpha": 32})


def test_a_rank_larger_than_the_matrix_is_refused():
    with pytest.raises(UserError, match="larger than"):
        LoraAdapter(LoraConfig(r=9)).make_layer("blocks.0.att.key", nn.Linear(8, 16, bias=False))
