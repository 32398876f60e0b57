"""Smaller models inside larger ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rwkvpeft.checkpoints.grow import grow, grown_shape
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import new_shape
from rwkvpeft.ops.choose import choose_backend
from rwkvpeft.ops.contract import Needs
from rwkvpeft.registry import MODELS, find

VERSIONS = ("x052", "x060", "x070")


def small_shape(version):
    return new_shape(version, n_layer=2, n_embd=16, vocab_size=11, head_size=8)


def drawn(shape, spread=0.0):
    torch.manual_seed(1)
    weights = find(MODELS, shape.version, flag="").initial_weights(shape)
    return {name: tensor + spread * torch.randn_like(tensor) for name, tensor in weights.items()}


def logits(shape, weights, tokens):
    needs = Needs(device_type="cpu", dtype=torch.float32, head_size=shape.head_size, training=False)
    model = build_model(shape, choose_backend(operator_of(shape), "torch", needs, None).run)
    fill_model(model, weights, device="cpu", dtype=torch.float32, source="test")
    with torch.no_grad():
        return model.eval()(tokens)[0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "sizes", [{"n_layer": 4}, {"vocab_size": 19}, {"dim_ffn": 96}, {"dim_att": 24}, {"n_layer": 3, "vocab_size": 12}]
)
def test_a_model_that_grows_anything_but_its_residual_stream_computes_the_same_at_first(version, sizes):
    shape = small_shape(version)
    small = drawn(shape, spread=0.2)
    larger = grown_shape(shape, sizes, "small.pth")
    weights, growth = grow(small, drawn(larger), "small.pth")
    tokens = torch.arange(10).view(1, 10)
    assert growth.anew or growth.partly
    assert torch.equal(growth_of(larger, sizes), torch.ones(len(sizes)))
    torch.testing.assert_close(logits(larger, weights, tokens)[..., :11], logits(shape, small, tokens))


def growth_of(shape, sizes):
    return torch.tensor([float(getattr(shape, name) == size) for name, size in sizes.items()])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wider_model_holds_the_smaller_one_in_its_corner(version):
    shape = small_shape(version)
    small = drawn(shape, spread=0.2)
    larger = grown_shape(shape, {"n_embd": 32}, "small.pth")
    initial = drawn(larger)
    weights, growth = grow(small, initial, "small.pth")
    name = "blocks.1.att.key.weight"
    assert torch.equal(weights[name][:16, :16], small[name])
    assert torch.equal(weights[name][16:], initial[name][16:])
    assert name in growth.partly
    assert growth.taken == sum(tensor.numel() for tensor in small.values())
    assert "drawn anew: 0 tensors" in growth.lines("small.pth")[-1]
    logits(larger, weights, torch.arange(10).view(1, 10))


def test_unusual_ranks_and_sizes_are_kept():
    shape = replace(small_shape("x070"), gate_rank=48, dim_ffn=96)
    assert grown_shape(shape, {"n_layer": 3}, "small.pth") == replace(shape, n_layer=3)
    wider = grown_shape(shape, {"n_embd": 32}, "small.pth")
    assert (wider.gate_rank, wider.dim_ffn, wider.dim_att) == (48, 128, 32)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"n_layer": 1}, "larger than the sizes asked for"),
        ({"n_layer": 2}, "need not grow"),
        ({"version": "x060", "n_layer": 3}, "another version"),
        ({"head_size": 16, "n_layer": 3}, "another head size"),
    ],
)
def test_what_is_no_growth_is_refused(sizes, words):
    with pytest.raises(UserError, match=words):
        grown_shape(small_shape("x070"), sizes, "small.pth")


def test_a_file_in_which_nothing_fits_is_refused():
    larger = replace(small_shape("x070"), n_layer=3)
    with pytest.raises(UserError, match="nothing in other.pth fits"):
        grow({}, drawn(larger), "other.pth")
    with pytest.raises(UserError, match="no place for"):
        grow({"model.embed_tokens.weight": torch.ones(2, 2)}, drawn(larger), "other.pth")
