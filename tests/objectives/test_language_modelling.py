"""The objective against golden models, and its adding up over micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rwkvpeft import load_model
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.models.layers import Linear
from rwkvpeft.objectives.language_modelling import LanguageModelling, document_lengths
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.quantization.format import build_format
from rwkvpeft.quantization.linear import QuantizedLinear


def batch_of(tokens, targets):
    weights = (targets >= 0).float()
    return TokenBatch(tokens, targets, weights, weights.sum().double())


@pytest.fixture(params=["v5", "v6", "v7"])
def model_and_data(request, golden):
    model = load_model(golden / f"model_{request.param}_rand.pth", dtype=torch.float32)
    data = np.load(golden / f"model_{request.param}_rand.npz", allow_pickle=False)
    batch = batch_of(torch.from_numpy(data["tokens"]).long(), torch.from_numpy(data["targets"]).long())
    return model, data, batch


@pytest.mark.golden
@pytest.mark.parametrize("penalty", [1e-4, 0.0])
def test_loss_and_gradients_are_upstreams(model_and_data, penalty):
    model, data, batch = model_and_data
    loss = LanguageModelling(logit_penalty=penalty, chunk_rows=16)(model, batch)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(float(data["loss_ce"]), abs=1e-5)
    prefix = "g" if penalty else "nol2_g"
    compared = 0
    for key in data.files:
        kind, _, name = key.partition("|")
        if kind not in (prefix, f"{prefix}8"):
            continue
        found = model.get_parameter(name).grad
        found = found[::8] if kind.endswith("8") else found
        expected = torch.from_numpy(data[key]).view_as(found)
        assert (found - expected).norm() <= 2e-4 * expected.norm(), name
        compared += 1
    assert compared >= 3


class Table(torch.nn.Module):
    """The smallest thing with hidden states and a head."""

    def __init__(self, vocabulary=11, channels=4):
        super().__init__()
        self.emb = torch.nn.Embedding(vocabulary, channels)
        self.head = Linear(channels, vocabulary)
        torch.nn.init.normal_(self.head.weight)

    def hidden(self, tokens, state=None, sequences=None):
        return self.emb(tokens), state


def test_micro_batches_with_a_common_normaliser_add_up_to_the_whole():
    model, objective = Table(), LanguageModelling()
    whole = batch_of(torch.randint(11, (4, 6)), torch.randint(11, (4, 6)))
    whole = whole._replace(weights=torch.rand(4, 6))
    normaliser = whole.weights.sum()
    parts = [objective(model, TokenBatch(*(t[i : i + 1] for t in whole[:3]), normaliser), normaliser) for i in range(4)]
    expected = objective(model, whole)
    torch.testing.assert_close(sum(part.total for part in parts), expected.total)
    torch.testing.assert_close(sum(part.tokens for part in parts), expected.tokens)


def test_a_batch_of_weight_zero_has_loss_and_gradient_zero():
    model = Table()
    batch = batch_of(torch.randint(11, (2, 3)), torch.full((2, 3), -100))
    loss = LanguageModelling(logit_penalty=0.0)(model, batch)
    loss.total.backward()
    assert loss.total == 0
    assert loss.tokens == 0
    assert not model.emb.weight.grad.any()


class Wrapped(torch.nn.Module):
    """A head with something around it, as an adapter leaves it."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def loss_and_gradient(model, batch):
    model.zero_grad()
    loss = LanguageModelling(logit_penalty=0.1, chunk_rows=4)(model, batch).total
    loss.backward()
    return loss.detach(), model.emb.weight.grad.clone()


def test_a_quantised_head_trains_as_its_dequantised_weight_does():
    model = Table()
    batch = batch_of(torch.randint(11, (4, 6)), torch.randint(11, (4, 6)))
    quantised = QuantizedLinear.from_weight(model.head.weight, build_format("fp8"))
    model.head.weight.data = quantised.dequantized()
    expected = loss_and_gradient(model, batch)
    model.head = quantised
    torch.testing.assert_close(loss_and_gradient(model, batch), expected, rtol=0, atol=0)


def test_a_wrapped_head_trains_as_the_bare_one():
    model = Table()
    batch = batch_of(torch.randint(11, (4, 6)), torch.randint(11, (4, 6)))
    expected, head_gradient = loss_and_gradient(model, batch), model.head.weight.grad.clone()
    model.head = Wrapped(model.head)
    torch.testing.assert_close(loss_and_gradient(model, batch), expected)
    torch.testing.assert_close(model.head.base.weight.grad, head_gradient)


def test_label_smoothing_spreads_a_share_of_each_target():
    torch.manual_seed(3)
    model = Table().double()
    tokens = torch.tensor([[1, 4, 2, 7]])
    batch = TokenBatch(tokens, tokens.roll(-1, 1), torch.tensor([[1.0, 0.0, 2.0, 1.0]]), torch.tensor(4.0))
    found = LanguageModelling(label_smoothing=0.1)(model, batch).total
    log_p = model.head(model.emb(tokens)).log_softmax(-1)[0]
    target = 0.9 * torch.nn.functional.one_hot(batch.labels[0], 11).double() + 0.1 / 11
    each = -(target * log_p).sum(-1)
    assert found.item() == pytest.approx((each * batch.weights[0]).sum().item() / 4, abs=1e-12)


def test_a_row_is_as_long_as_its_last_trained_token():
    weights = torch.tensor([[0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    batch = TokenBatch(torch.zeros(3, 4).long(), torch.zeros(3, 4).long(), weights, weights.sum())
    assert document_lengths(batch).tolist() == [3, 1, 4]
    assert document_lengths(batch, share=0.25).tolist() == [16, 16, 16]
    assert document_lengths(batch._replace(sequences=Sequences([12]))) is None
