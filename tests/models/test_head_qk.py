"""headQK against RWKV-v5/src/model.py's formula, in training, packed, and where it is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.checkpoints.load import build_model, fill_model, load_model, operator_of
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.generation.generate import TextGenerator
from rwkvpeft.models.shape import new_shape, read_shape
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.registry import BACKENDS, MODELS, find

WIDTH = 6
# tokens come again, so that their logits are sums
TOKENS = torch.tensor([[1, 4, 1, 1, 7, 4, 9], [3, 3, 3, 2, 8, 2, 3]])


def weights_of(version="x060"):
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=12, head_size=8, head_qk=WIDTH)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    return shape, {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}


def small_model(version="x060"):
    shape, weights = weights_of(version)
    model = build_model(shape, find(BACKENDS[operator_of(shape)], "torch", flag="--op").run)
    fill_model(model, weights, device="cpu", dtype=torch.float64, source="test")
    return model.train()


def as_rwkv_lm(model, tokens):
    x, _ = model.hidden(tokens)
    length = tokens.shape[1]
    c = (model.head_q(x) @ model.head_k(x).transpose(-2, -1)) * (1.0 / WIDTH)
    c = c.masked_fill(torch.tril(torch.ones(length, length)) == 0, 0)
    return model.head(x) + c @ F.one_hot(tokens, num_classes=12).to(x.dtype)


class L2Wrap(torch.autograd.Function):
    """RWKV-LM's, with its factor 1e-4."""

    @staticmethod
    def forward(ctx, loss, y):
        ctx.save_for_backward(y)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        y = ctx.saved_tensors[0]
        top, index = torch.max(y, -1, keepdim=True)
        return grad_output, torch.zeros_like(y).scatter_(-1, index, top * 1e-4 / (y.shape[0] * y.shape[1]))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)


def batch_of(tokens, sequences=None):
    weights = torch.ones(tokens.shape)
    return TokenBatch(tokens, tokens.roll(-1, 1), weights, weights.sum(), sequences)


@pytest.mark.parametrize("version", MODELS)
def test_the_logits_are_rwkv_lms(version):
    model = small_model(version)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS)[0], as_rwkv_lm(model, TOKENS), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [3, 5, 100])
@pytest.mark.parametrize("penalty", [1e-4, 0.0])
def test_loss_and_every_gradient_are_rwkv_lms(penalty, chunk_rows):
    model = small_model()
    logits = as_rwkv_lm(model, TOKENS)
    loss = F.cross_entropy(logits.flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    expected = gradients(model, L2Wrap.apply(loss, logits) if penalty else loss)
    objective = LanguageModelling(logit_penalty=penalty, chunk_rows=chunk_rows)
    found = gradients(model, objective(model, batch_of(TOKENS)).total)
    assert_equal(found, expected)
    assert found["head_q.weight"].any()


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_packed_documents_do_not_see_each_other(chunk_rows):
    model = small_model()
    objective = LanguageModelling(chunk_rows=chunk_rows)
    row, lengths = TOKENS.flatten()[None], [4, 1, 0, 9]
    batch = batch_of(row, Sequences(lengths))
    found = gradients(model, objective(model, batch).total)
    total = 0.0
    for ids, labels in zip(row.split(lengths, 1), batch.labels.split(lengths, 1), strict=True):
        if ids.numel():
            alone = TokenBatch(ids, labels, torch.ones(ids.shape), torch.tensor(1.0))
            total = total + objective(model, alone, torch.tensor(float(row.numel()))).total
    assert_equal(found, gradients(model, total))


def test_a_frozen_base_with_an_adapter_on_its_blocks_uses_it():
    model = small_model()
    build_adapter("lora", {"r": 2, "lora_dropout": 0}, []).attach(model)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS)[0], as_rwkv_lm(model, TOKENS), rtol=1e-10, atol=1e-12)
    assert LanguageModelling()(model, batch_of(TOKENS)).total.requires_grad


def test_a_file_tells_its_width_and_may_have_rwkv_lms_mask(tmp_path):
    shape, weights = weights_of()
    assert read_shape(weights) == shape
    save_tensors(tmp_path / "base.pth", {**weights, "copy_mask": torch.tril(torch.ones(4, 4))})
    assert load_model(tmp_path / "base.pth").shape.head_qk == WIDTH


def test_its_initial_weights_add_nothing():
    torch.manual_seed(1)
    shape = new_shape("x052", n_layer=1, n_embd=32, vocab_size=12, head_size=8, head_qk=WIDTH)
    weights = find(MODELS, "x052", flag="--my_testing").initial_weights(shape)
    assert not weights["head_q.weight"].any()
    assert torch.allclose(weights["head_k.weight"] @ weights["head_k.weight"].T, 0.01 * torch.eye(WIDTH), atol=1e-6)


def test_no_state_serves_it():
    model = small_model()
    _, state = model(TOKENS)
    with pytest.raises(UserError, match="going on from a state"):
        model(TOKENS, state)


def test_it_continues_no_text():
    torch.manual_seed(1)
    shape = new_shape("x060", n_layer=1, n_embd=32, vocab_size=256, head_size=8, head_qk=WIDTH)
    model = build_model(shape, find(BACKENDS["wkv6"], "torch", flag="--op").run)
    with pytest.raises(UserError, match="continuing a text"):
        TextGenerator(model, load_tokenizer("bytes"))
