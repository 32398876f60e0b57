"""Dropout against RWKV-LM's formula, NEFTune's noise against its paper's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.models.neftune import add_noise
from rwkvpeft.models.recompute import LEVELS, draws_random_numbers
from rwkvpeft.models.shape import new_shape
from rwkvpeft.models.state import BlockState
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.registry import BACKENDS, MODELS, find

VERSIONS = sorted(MODELS)
TOKENS = torch.arange(2 * 7).view(2, 7) * 5 % 40


def small_model(version):
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=40, head_size=8)
    model = build_model(shape, find(BACKENDS[operator_of(shape)], "torch", flag="--op").run)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    fill_model(model, weights, device="cpu", dtype=torch.float64, source="test")
    return model.train()


def as_rwkv_lm(model, p):
    """RWKV-v5/src/model.py, forward of Block and RWKV with ``args.dropout`` > 0, around this model's own mixings."""
    x, first_value = F.dropout(model.emb(TOKENS), p), None
    for block in model.blocks:
        if block.ln0 is not None:
            x = block.ln0(x)
        mixed = PLAIN.norm_mix(x, None, block.ln1.norm(), None, block.att.shift_mixes())
        update, first_value, _ = block.att(mixed, first_value, BlockState())
        x = F.dropout(x + update, p)
        mixed = PLAIN.norm_mix(x, None, block.ln2.norm(), None, block.ffn.shift_mixes())
        x = F.dropout(x + block.ffn(*mixed.tokens), p)
    return model.head(model.ln_out(x))


def loss_and_gradients(model, logits):
    torch.manual_seed(7)
    loss = F.cross_entropy(logits().flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("level", LEVELS.values())
@pytest.mark.parametrize("version", VERSIONS)
def test_dropout_is_where_rwkv_lm_has_it(version, level):
    model = small_model(version)
    expected = loss_and_gradients(model, lambda: as_rwkv_lm(model, 0.3))
    model.regularise(dropout=0.3)
    model.recompute = level
    found = loss_and_gradients(model, lambda: model(TOKENS)[0])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{"dropout": 0.3}, {"neftune_alpha": 5.0}])
def test_noise_acts_in_training_only(settings):
    model = small_model("x070")
    plain = model.eval()(TOKENS)[0]
    model.regularise(**settings)
    assert torch.equal(model.eval()(TOKENS)[0], plain)
    assert not torch.equal(model.train()(TOKENS)[0], plain)


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"neftune_alpha": 5.0}])
def test_a_model_with_noise_is_known_to_draw_random_numbers(settings):
    model = small_model("x070")
    assert not draws_random_numbers(model)
    model.regularise(**settings)
    assert draws_random_numbers(model)


def test_the_noise_is_uniform_and_as_large_as_alpha_over_the_root_of_length_and_width():
    noise = add_noise(torch.zeros(3, 50, 64, dtype=torch.float64), 5.0, None, None)
    bound = 5 / math.sqrt(50 * 64)
    assert noise.abs().max() <= bound
    assert noise.abs().max() > 0.99 * bound
    assert noise.var().item() == pytest.approx(bound**2 / 3, rel=0.05)


def test_the_noise_of_a_row_goes_by_its_own_length():
    largest = add_noise(torch.zeros(2, 50, 64), 5.0, None, torch.tensor([50, 8])).abs().amax(dim=(1, 2))
    assert largest.tolist() == pytest.approx([5 / math.sqrt(50 * 64), 5 / math.sqrt(8 * 64)], rel=0.02)


def test_the_noise_of_a_packed_document_is_that_of_the_document_alone():
    sequences = Sequences([8, 0, 42])
    noise = add_noise(torch.zeros(1, 50, 64), 5.0, sequences, None).abs()[0]
    bounds = [5 / math.sqrt(length * 64) for length in (8, 42)]
    assert [noise[:8].max().item(), noise[8:].max().item()] == pytest.approx(bounds, rel=0.02)


@pytest.mark.parametrize("level", LEVELS.values())
def test_noise_and_dropout_together_pass_through_recomputation(level):
    model = small_model("x070")
    model.regularise(dropout=0.2, neftune_alpha=5.0)
    expected = loss_and_gradients(model, lambda: model(TOKENS)[0])
    model.recompute = level
    found = loss_and_gradients(model, lambda: model(TOKENS)[0])
    assert all(torch.equal(found[name], value) for name, value in expected.items())
