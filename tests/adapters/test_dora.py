"""DoRA's magnitudes."""

from __future__ import annotations

import torch
from torch import nn

from rwkvpeft.adapters.lora import DoraAdapter, DoraLinear, row_lengths
from rwkvpeft.models.layers import Linear


def frozen(out: int, in_: int) -> Linear:
    base = Linear(in_, out)
    nn.init.normal_(base.weight)
    return base.requires_grad_(False)


def test_magnitudes_start_as_the_lengths_of_the_rows():
    base = frozen(6, 9)
    layer = DoraLinear(base, 2, 1.0)
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), base.weight.norm(dim=1))


def test_a_row_of_zeros_stays_a_row_of_zeros():
    base = frozen(3, 5)
    base.weight[1] = 0
    layer = DoraLinear(base, 2, 1.0)
    y = layer(torch.randn(4, 5))
    assert not y[:, 1].any()
    assert y.isfinite().all()
    merged = DoraAdapter().merge("k.weight", base.weight.clone(), {
        "k.lora_A": layer.lora_A.detach(), "k.lora_B": layer.lora_B.detach(),
        "k.lora_magnitude_vector": layer.lora_magnitude_vector.detach(),
    })
    torch.testing.assert_close(merged, base.weight)


def test_small_changes_of_a_magnitude_reach_the_output_in_bf16():
    layer = DoraLinear(frozen(4, 64).to(torch.bfloat16), 2, 1.0)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(10_000, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.lora_magnitude_vector.copy_(1.0045 * layer._lengths())
        direction = layer.base.weight.float() + layer.lora_B @ layer.lora_A
        plain, scaled = x.float() @ direction.T, layer(x).float()
    # each output is rounded, but not all of them in one direction
    found = (scaled * plain).sum(0) / (plain * plain).sum(0)
    torch.testing.assert_close(found, torch.full((4,), 1.0045), rtol=0, atol=1e-3)


def test_lengths_are_constants_to_the_gradient():
    base = frozen(6, 9)
    layer = DoraLinear(base, 2, 0.5)
    nn.init.normal_(layer.lora_B)
    x, grad = torch.randn(4, 9), torch.randn(4, 6)
    layer(x).backward(grad)
    scale = layer.lora_magnitude_vector.detach() / row_lengths(base.weight, layer.lora_A, layer.lora_B, 0.5)
    expected = (grad * scale * 0.5).T @ (x @ layer.lora_A.T)
    torch.testing.assert_close(layer.lora_B.grad, expected.detach())


def test_lengths_of_many_rows_are_those_of_the_whole():
    weight, lora_a, lora_b = torch.randn(2500, 7), torch.randn(3, 7), torch.randn(2500, 3)
    expected = (weight + 0.3 * lora_b @ lora_a).norm(dim=1)
    torch.testing.assert_close(row_lengths(weight, lora_a, lora_b, 0.3), expected)


def test_the_column_of_another_program_is_read():
    tensors = {"blocks.0.att.key.lora_M": torch.ones(6, 1), "blocks.0.att.key.lora_A": torch.ones(2, 9)}
    renamed = DoraAdapter().rename(tensors)
    assert renamed["blocks.0.att.key.lora_magnitude_vector"].shape == (6,)
    assert DoraAdapter.recognises(tensors)
