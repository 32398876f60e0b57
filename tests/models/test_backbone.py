from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.models.shape import new_shape
from rwkvpeft.ops.choose import choose_backend
from rwkvpeft.ops.contract import Needs
from rwkvpeft.registry import MODELS, find

VERSIONS = sorted(MODELS)


def small_model(version, dtype=torch.float64):
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=40, head_size=8)
    needs = Needs(device_type="cpu", dtype=dtype, head_size=8, training=True)
    model = build_model(shape, choose_backend(operator_of(shape), "torch", needs).run)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    fill_model(model, weights, device="cpu", dtype=dtype, source="test")
    return model


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_a_sequence_cut_anywhere_gives_the_same_logits_and_state(version, lengths):
    model = small_model(version)
    tokens = torch.randint(0, 40, (2, max(sum(lengths), 1)))
    pieces = tokens.split([*lengths, tokens.shape[1] - sum(lengths)], dim=1)
    with torch.no_grad():
        whole, end = model(tokens)
        state, parts = None, []
        for piece in pieces:
            part, state = model(piece, state)
            parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)
    assert torch.allclose(state.memories(), end.memories(), atol=1e-10)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_state_keeps_no_other_token_in_memory(version):
    model = small_model(version)
    with torch.no_grad():
        _, state = model(torch.randint(0, 40, (2, 9)))
    for tensor in (tensor for block in state.blocks for tensor in block):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("version", VERSIONS)
def test_recomputing_activations_changes_no_gradient(version):
    model, tokens = small_model(version).train(), torch.randint(0, 40, (2, 11))
    gradients = []
    for model.recompute in ("none", "selective", "block"):
        model.zero_grad()
        model(tokens)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_tuned_state_equals_the_same_memory_passed_in(version):
    model, tokens = small_model(version), torch.randint(0, 40, (3, 7))
    _, read = model(tokens[:1])
    zero_shift = [
        b._replace(time_shift=None, channel_shift=None, memory=b.memory.expand(3, -1, -1, -1)) for b in read.blocks
    ]
    expected, _ = model(tokens, read._replace(blocks=tuple(zero_shift)))
    for block, left in zip(model.blocks, read.blocks, strict=True):
        block.att.time_state = nn.Parameter(left.memory[0].detach())
    assert torch.allclose(model(tokens)[0], expected, atol=1e-10)


@pytest.mark.parametrize("version", VERSIONS)
def test_fp32_trained_weights_work_on_bf16_activations(version):
    model = small_model(version, torch.bfloat16)
    model.blocks[1].att.key.weight = nn.Parameter(model.blocks[1].att.key.weight.float())
    logits, _ = model(torch.randint(0, 40, (1, 5)))
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert model.blocks[1].att.key.weight.grad.dtype == torch.float32


def test_dropout_acts_in_training_only():
    model, tokens = small_model("x070"), torch.randint(0, 40, (1, 6))
    for block in model.blocks:
        block.dropout = 0.5
    assert torch.equal(model.eval()(tokens)[0], model(tokens)[0])
    assert not torch.equal(model.train()(tokens)[0], model(tokens)[0])
