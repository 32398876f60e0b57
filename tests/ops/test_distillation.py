"""Hidden states to the loss of distillation, a few rows at a time."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.ops.cross_entropy import linear_cross_entropy
from rwkvpeft.ops.distillation import head_distillation, linear_distillation
from rwkvpeft.ops.divergence import Mix, Told, compare, likeliest

ROWS, CHANNELS, TOKENS = 13, 6, 31


@pytest.fixture
def case():
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, ROWS, CHANNELS, generator=draw, dtype=torch.float64)
    head = torch.randn(TOKENS, CHANNELS, generator=draw, dtype=torch.float64)
    labels = torch.randint(TOKENS, (1, ROWS), generator=draw)
    weights = torch.rand(1, ROWS, generator=draw, dtype=torch.float64)
    weights[0, [2, 3, 9]] = 0
    labels[0, 3] = -100
    found = likeliest(torch.randn(ROWS, TOKENS, generator=draw, dtype=torch.float64), 5, (2.0,))
    told = Told(found.ids[None].int(), (found.logprobs / 2 - found.normalisers[0][:, None])[None], found.tails[:1])
    return hidden, head, labels, weights, told


def whole(hidden, head, labels, weights, told, mix, normaliser):
    """The loss of all logits at once, by autograd."""
    flat, k = hidden.flatten(0, 1), told.ids.shape[-1]
    counted = weights.flatten() != 0
    z = (flat @ head.T)[counted]
    own = Told(told.ids.view(-1, k)[counted].long(), told.logprobs.view(-1, k)[counted], told.tail.flatten()[counted])
    q = (z / mix.temperature).log_softmax(1)
    q_tail = torch.log1p(-q.gather(1, own.ids).exp().sum(1))
    p, tail = own.logprobs, own.tail
    divergence = (p.exp() * (p - q.gather(1, own.ids))).sum(1) + tail.exp() * (tail - q_tail)
    plain = torch.nn.functional.cross_entropy(z, labels.flatten()[counted], reduction="none",
                                              label_smoothing=mix.smoothing)
    each = mix.alpha * mix.temperature**2 * divergence + (1 - mix.alpha) * plain
    return (each * weights.flatten()[counted]).sum() / normaliser


def results(compute, hidden, head, train_head=True):
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_(train_head)
    total = compute(hidden, head)
    total.backward()
    return total.detach(), hidden.grad, head.grad


@pytest.mark.parametrize("chunk_rows", [1, 4, 64])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("way", ["matrix", "module"])
def test_rows_in_chunks_give_what_all_give_at_once(case, way, compact, chunk_rows):
    hidden, head, labels, weights, told = case
    mix, normaliser = Mix("tail", 0.7, 2.0, 0.1), torch.tensor(5.0)
    settings = {"mix": mix, "normaliser": normaliser, "chunk_rows": chunk_rows, "compact": compact}

    def ours(hidden, head):
        if way == "matrix":
            return linear_distillation(hidden, head, labels, weights, told, **settings).total
        return head_distillation(hidden, lambda rows: rows @ head.T, labels, weights, told, **settings).total

    found = results(ours, hidden, head)
    expected = results(lambda hidden, head: whole(hidden, head, labels, weights, told, mix, normaliser), hidden, head)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", ["matrix", "module"])
def test_without_a_teacher_it_is_language_modelling(case, way):
    hidden, head, labels, weights, told = case
    normaliser, pull = weights.sum(), 0.1

    def ours(hidden, head):
        mix = Mix("tail", 0.0, 2.0, 0.1, pull)
        settings = {"mix": mix, "normaliser": normaliser, "chunk_rows": 4}
        if way == "matrix":
            return linear_distillation(hidden, head, labels, weights, told, **settings).total
        return head_distillation(hidden, lambda rows: rows @ head.T, labels, weights, told, **settings).total

    def plain(hidden, head):
        return linear_cross_entropy(hidden, head, labels, weights, normaliser=normaliser, logit_penalty=pull,
                                    chunk_rows=4, label_smoothing=0.1)

    torch.testing.assert_close(results(ours, hidden, head), results(plain, hidden, head))


def test_the_loss_is_the_mix_of_its_figures(case):
    hidden, head, labels, weights, told = case
    mix = Mix("reverse", 0.3, 2.0)
    found = linear_distillation(hidden, head, labels, weights, told, mix=mix, normaliser=weights.sum(), chunk_rows=4)
    torch.testing.assert_close(found.total, 0.3 * 4 * found.divergence + 0.7 * found.cross_entropy)


def test_figures_carry_no_gradient(case):
    hidden, head, labels, weights, told = case
    found = linear_distillation(hidden.requires_grad_(), head, labels, weights, told, mix=Mix(),
                                normaliser=weights.sum(), chunk_rows=4)
    assert [part.requires_grad for part in found] == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_comes_close_and_keeps_its_dtype(case, dtype):
    hidden, head, labels, weights, told = case
    settings = {"mix": Mix(), "normaliser": weights.sum(), "chunk_rows": 4}

    def compute(hidden, head):
        return linear_distillation(hidden, head, labels, weights, told, **settings).total

    expected, _, exact = results(compute, hidden, head)
    found, grad_hidden, grad_head = results(compute, hidden.to(dtype), head.to(dtype))
    assert (found.dtype, grad_hidden.dtype, grad_head.dtype) == (torch.float32, dtype, dtype)
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    assert (grad_head - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("way", ["matrix", "module"])
def test_a_batch_without_weight_has_a_backward_pass(case, way):
    hidden, head, labels, weights, told = case
    settings = {"mix": Mix(), "normaliser": torch.tensor(1.0), "chunk_rows": 4}

    def ours(hidden, head):
        if way == "matrix":
            return linear_distillation(hidden, head, labels, 0 * weights, told, **settings).total
        return head_distillation(hidden, lambda rows: rows @ head.T, labels, 0 * weights, told, **settings).total

    total, grad_hidden, _ = results(ours, hidden, head)
    assert total == 0
    assert not grad_hidden.any()


def test_all_logits_never_exist_at_once(case):
    hidden, head, labels, weights, told = case
    rows = []

    def counting(part):
        rows.append(len(part))
        return part @ head.T

    total = head_distillation(hidden.requires_grad_(), counting, labels, weights, told, mix=Mix(),
                              normaliser=weights.sum(), chunk_rows=4).total
    total.backward()
    assert max(rows) == 4
    assert sum(rows) == 2 * int((weights != 0).sum())


def test_the_rows_of_a_chunk_are_compared_as_they_are_alone(case):
    hidden, head, labels, weights, told = case
    mix = Mix("tail", 1.0, 2.0)
    k = told.ids.shape[-1]
    flat = Told(told.ids.view(-1, k), told.logprobs.view(-1, k), told.tail.flatten())
    each = compare((hidden @ head.T).flatten(0, 1), labels.flatten().clamp_min(0), flat, mix, gradient=False).divergence
    found = linear_distillation(hidden, head, labels, weights, told, mix=mix, normaliser=weights.sum(), chunk_rows=3)
    torch.testing.assert_close(found.divergence, (each * weights.flatten()).sum() / weights.sum())
