"""Dropout and noise in rows that are worked through in chunks: what is computed twice draws the same numbers."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.objectives.long_context import LongContext
from rwkvpeft.registry import BACKENDS, MODELS, find

TOKENS = torch.arange(2 * 10).view(2, 10) * 7 % 12
CHUNKS = [4, 4, 2]


def small_model(version):
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=12, head_size=8, pre_ffn=int(version != "x070"))
    model = build_model(shape, find(BACKENDS[operator_of(shape)], "torch", flag="--op").run)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    fill_model(model, weights, device="cpu", dtype=torch.float64, source="test")
    return model.train()


def gradients(model, loss):
    model.zero_grad()
    torch.manual_seed(5)
    total = loss()
    total.backward()
    return {"loss": total.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{"dropout": 0.3}, {"neftune_alpha": 5.0}])
@pytest.mark.parametrize("version", MODELS)
def test_exact_gradients_are_those_of_the_noise_that_was_drawn(version, settings):
    model = small_model(version)
    model.regularise(**settings)
    batch = TokenBatch(TOKENS, TOKENS.roll(-1, 1), torch.ones(2, 10), torch.tensor(20.0))
    inner = LanguageModelling(tells_lengths=True)

    def one_graph():
        state, total = None, torch.zeros(())
        parts = zip(*(tensor.split(CHUNKS, 1) for tensor in batch[:3]), strict=True)
        for ids, labels, weights in parts:
            chunk = TokenBatch(ids, labels, weights, batch.step_weight)
            loss, state = inner.part(model, chunk, batch.step_weight, state, ids.shape[1] / 10)
            total = total + loss.total
        return total

    expected = gradients(model, one_graph)
    found = gradients(model, lambda: LongContext(inner, chunk=4, exact=True)(model, batch, batch.step_weight).total)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11)
