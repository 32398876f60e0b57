"""The log-probabilities of labels in chunks against log_softmax of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvpeft.ops.token_logprobs import token_logprobs

KINDS = ("trained", "frozen", "called")


def inputs(vocabulary=37, dtype=torch.float64, rows=(3, 7), channels=5):
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(*rows, channels, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, channels, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, rows, generator=generator)
    weights = torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) > 0.4)
    return hidden, weight, torch.where(weights > 0, labels, -100), weights


def whole(hidden, weight, labels, weights, temperature=1.0):
    """Log-probability, collision and entropy of each row."""
    log_softmax = F.log_softmax(hidden @ weight.T / temperature, dim=-1).flatten(0, -2)
    own = log_softmax.gather(1, labels.flatten().clamp_min(0)[:, None]).squeeze(1)
    figures = (own, (2 * log_softmax).exp().sum(1).log(), -(log_softmax.exp() * log_softmax).sum(1))
    return tuple(figure.where(weights.flatten() > 0, 0) for figure in figures)


def head_of(kind, weight):
    if kind == "called":
        return lambda rows: rows @ weight.T
    return weight if kind == "trained" else weight.detach()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_whole_logits(kind, temperature, chunk_rows, compact):
    hidden, weight, labels, weights = inputs()
    wanted = [hidden] if kind == "frozen" else [hidden, weight]
    found = token_logprobs(
        hidden, head_of(kind, weight), labels, weights=weights, chunk_rows=chunk_rows, compact=compact,
        temperature=temperature,
    ).logprobs
    expected = whole(hidden, weight, labels, weights, temperature)[0]
    torch.testing.assert_close(found, expected)
    pull = torch.randn(len(found), dtype=torch.float64)
    ours = torch.autograd.grad(found @ pull, wanted)
    torch.testing.assert_close(ours, torch.autograd.grad(expected @ pull, wanted))


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_collision_and_entropy_are_those_of_whole_logits_and_leave_the_gradient_alone(kind, compact):
    hidden, weight, labels, weights = inputs()
    found = token_logprobs(
        hidden, head_of(kind, weight), labels, weights=weights, chunk_rows=4, compact=compact, temperature=0.7,
        collision=True, entropy=True,
    )
    expected = whole(hidden, weight, labels, weights, 0.7)
    torch.testing.assert_close(tuple(found), expected)
    assert not found.collision.requires_grad
    assert not found.entropy.requires_grad
    ours = torch.autograd.grad(found.logprobs.sum(), hidden)
    torch.testing.assert_close(ours, torch.autograd.grad(expected[0].sum(), hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    hidden, weight, labels, weights = inputs(7, rows=(5,), channels=3)

    def run(hidden, weight):
        return token_logprobs(hidden, head_of(kind, weight), labels, weights=weights, chunk_rows=2).logprobs

    torch.autograd.gradcheck(run, (hidden, weight.requires_grad_(kind != "frozen")))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_costs_its_rounding_alone(kind, dtype, limit):
    hidden, weight, labels, weights = inputs(300, dtype, channels=16)
    found = token_logprobs(hidden, head_of(kind, weight), labels, weights=weights, chunk_rows=4).logprobs
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = whole(*exact, labels, weights)[0]
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= limit * expected.norm()
    wanted = 1 if kind == "frozen" else 2
    pull = torch.randn(len(found))
    ours = torch.autograd.grad(found @ pull, (hidden, weight)[:wanted])
    for mine, theirs in zip(ours, torch.autograd.grad(expected @ pull.double(), exact[:wanted]), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() <= limit * theirs.norm()


def test_fp16_gradients_of_a_trained_head_stay_finite_under_a_large_loss_scale():
    hidden, weight, labels, weights = inputs(37, torch.float16)
    weight = weight.detach().float().requires_grad_()
    found = token_logprobs(hidden * 100, weight, labels, weights=weights, chunk_rows=4).logprobs
    (grad,) = torch.autograd.grad(found.sum() * 2.0**14, weight)
    assert grad.isfinite().all()
    assert grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_weights_has_a_backward_pass(kind):
    hidden, weight, labels, weights = inputs()
    found = token_logprobs(hidden, head_of(kind, weight), labels, weights=weights * 0, chunk_rows=4, collision=True)
    found.logprobs.sum().backward()
    assert not found.logprobs.any()
    assert not found.collision.any()
    assert not hidden.grad.any()


class Sizes(TorchDispatchMode):
    """Remembers the largest number of elements a tensor had, and what was called."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        result = function(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else (result,)
        self.largest = max(self.largest, *(part.numel() for part in parts if isinstance(part, torch.Tensor)))
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compact", [False, True])
def test_no_more_logits_exist_than_a_chunks_and_only_leaving_out_rows_waits_for_the_device(kind, compact):
    hidden, weight, labels, weights = inputs(300, rows=(50,))
    with Sizes() as sizes:
        token_logprobs(
            hidden, head_of(kind, weight), labels, weights=weights, chunk_rows=6, compact=compact
        ).logprobs.sum().backward()
    assert sizes.largest <= 6 * 300
    assert bool(sizes.names & {"nonzero", "_local_scalar_dense", "masked_select"}) == compact


def test_what_is_added_beside_the_head_is_told_its_rows():
    hidden, weight, labels, weights = inputs(rows=(9,))
    added = torch.randn(9, 37, dtype=torch.float64, requires_grad=True)
    found = token_logprobs(
        hidden, weight, labels, weights=weights, chunk_rows=4, beside=lambda logits, place: logits + added[place]
    ).logprobs
    logits = hidden @ weight.T + added
    own = F.log_softmax(logits, -1).gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    expected = own.where(weights > 0, 0)
    torch.testing.assert_close(found, expected)
    wanted = (hidden, weight, added)
    ours = torch.autograd.grad(found.sum(), wanted)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), wanted))


def test_without_gradient_nothing_is_kept_and_the_values_are_the_same():
    hidden, weight, labels, weights = inputs()
    found = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found.append(token_logprobs(hidden, weight, labels, weights=weights, chunk_rows=4).logprobs)
    assert torch.equal(*found)
    assert found[0].requires_grad
    assert not found[1].requires_grad


def test_a_module_with_an_adapter_of_its_own_is_called():
    hidden, _, labels, weights = inputs(37, torch.float32)
    head = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 37, bias=False))
    found = token_logprobs(hidden, head, labels, weights=weights, chunk_rows=4).logprobs
    own = F.log_softmax(head(hidden), -1).flatten(0, 1).gather(1, labels.flatten().clamp_min(0)[:, None]).squeeze(1)
    expected = own.where(weights.flatten() > 0, 0)
    torch.testing.assert_close(found, expected)
    wanted = list(head.parameters())
    ours = torch.autograd.grad(found.sum(), wanted)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), wanted))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_rows_in_triton_are_those_in_pytorch(kind, dtype, limit):
    pytest.importorskip("triton")
    found = []
    for rows in ("torch", "triton"):
        hidden, weight, labels, weights = inputs(700, dtype)
        logprobs = token_logprobs(
            hidden, head_of(kind, weight), labels, weights=weights, chunk_rows=4, rows=rows
        ).logprobs
        logprobs.sum().backward()
        found.append([logprobs, hidden.grad, *([weight.grad] if kind == "trained" else [])])
    for ours, theirs in zip(*found, strict=True):
        assert (ours.double() - theirs.double()).norm() <= limit * theirs.double().norm()
