"""The chunked loss against plain autograd over whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvpeft.ops.cross_entropy import head_cross_entropy, linear_cross_entropy


class Wrap(torch.autograd.Function):
    """The penalty as RWKV-LM writes it: the loss passes through, the gradient of the largest logits is added."""

    @staticmethod
    def forward(ctx, loss, logits, penalty):
        ctx.save_for_backward(logits)
        ctx.penalty = penalty
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        top, index = logits.max(-1, keepdim=True)
        pull = torch.zeros_like(logits).scatter_(-1, index, top * ctx.penalty / logits[..., 0].numel())
        return grad, pull * grad, None


def whole_logits(hidden, head, labels, weights, normaliser, penalty, smoothing=0.0):
    logits = hidden @ head.T
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.clamp_min(0).flatten(), reduction="none", label_smoothing=smoothing
    )
    return Wrap.apply((losses * weights.flatten()).sum() / normaliser, logits, penalty)


def inputs(vocabulary=37, dtype=torch.float64, shape=(3, 7), channels=5):
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(*shape, channels, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(vocabulary, channels, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(vocabulary, shape, generator=generator)
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.4)
    return hidden, head, torch.where(weights > 0, labels, -100), weights


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_a_head_that_is_called_gives_the_loss_and_gradients_of_whole_logits(penalty, chunk_rows):
    hidden, head, labels, weights = inputs()
    normaliser = torch.tensor(2.5)
    ours = head_cross_entropy(
        hidden, lambda rows: rows @ head.T, labels, weights,
        normaliser=normaliser, logit_penalty=penalty, chunk_rows=chunk_rows,
    )
    expected = whole_logits(hidden, head, labels, weights, normaliser, penalty)
    torch.testing.assert_close(ours, expected)
    ours_grads = torch.autograd.grad(ours * 3, (hidden, head))
    torch.testing.assert_close(ours_grads, torch.autograd.grad(expected * 3, (hidden, head)))


def test_a_called_head_has_a_backward_pass_where_nothing_has_weight():
    hidden, head, labels, weights = inputs()
    loss = head_cross_entropy(
        hidden, lambda rows: rows @ head.T, labels, torch.zeros_like(weights),
        normaliser=torch.tensor(1.0), logit_penalty=0, chunk_rows=4,
    )
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("vocabulary", [3, 37, 256, 700])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_loss_and_both_gradients_equal_those_of_whole_logits(vocabulary, penalty, chunk_rows):
    hidden, head, labels, weights = inputs(vocabulary)
    normaliser = torch.tensor(2.5)
    ours = linear_cross_entropy(
        hidden, head, labels, weights, normaliser=normaliser, logit_penalty=penalty, chunk_rows=chunk_rows
    )
    expected = whole_logits(hidden, head, labels, weights, normaliser, penalty)
    torch.testing.assert_close(ours, expected)
    # an incoming gradient other than 1, which the penalty must follow
    ours_grads = torch.autograd.grad(ours * 3, (hidden, head))
    torch.testing.assert_close(ours_grads, torch.autograd.grad(expected * 3, (hidden, head)))


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("whole", [linear_cross_entropy, head_cross_entropy])
def test_smoothed_labels_give_the_loss_and_gradients_of_whole_logits(whole, penalty):
    hidden, head, labels, weights = inputs(700)
    normaliser = torch.tensor(2.5)
    ours = whole(
        hidden, head if whole is linear_cross_entropy else lambda rows: rows @ head.T, labels, weights,
        normaliser=normaliser, logit_penalty=penalty, chunk_rows=4, label_smoothing=0.2,
    )
    expected = whole_logits(hidden, head, labels, weights, normaliser, penalty, smoothing=0.2)
    torch.testing.assert_close(ours, expected)
    ours_grads = torch.autograd.grad(ours, (hidden, head))
    torch.testing.assert_close(ours_grads, torch.autograd.grad(expected, (hidden, head)))


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_computing_rows_without_weight_too_changes_nothing(penalty, smoothing):
    hidden, head, labels, weights = inputs(700)
    found = []
    for compact in (True, False):
        loss = linear_cross_entropy(
            hidden, head, labels, weights, normaliser=torch.tensor(2.5), logit_penalty=penalty, chunk_rows=4,
            label_smoothing=smoothing, compact=compact,
        )
        found.append([loss, *torch.autograd.grad(loss, (hidden, head))])
    torch.testing.assert_close(found[0], found[1])


class Calls(TorchDispatchMode):
    """Remembers what was called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("whole", [linear_cross_entropy, head_cross_entropy])
@pytest.mark.parametrize("compact", [False, True])
def test_only_leaving_out_rows_waits_for_the_device(whole, compact):
    hidden, head, labels, weights = inputs()
    with Calls() as calls:
        whole(
            hidden, head if whole is linear_cross_entropy else lambda rows: rows @ head.T, labels, weights,
            normaliser=torch.tensor(2.5), logit_penalty=0.0, chunk_rows=4, compact=compact,
        ).backward()
    assert bool(calls.names & {"nonzero", "_local_scalar_dense", "masked_select"}) == compact


def test_autocast_changes_nothing():
    hidden, head, labels, weights = inputs(dtype=torch.float32)
    arguments = {"normaliser": torch.tensor(2.0), "logit_penalty": 1e-4, "chunk_rows": 8}
    losses = [linear_cross_entropy(hidden, head, labels, weights, **arguments)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses.append(linear_cross_entropy(hidden, head, labels, weights, **arguments))
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))


def test_fp32_agrees_with_fp64():
    hidden, head, labels, weights = inputs(700)
    arguments = {"normaliser": torch.tensor(2.0), "logit_penalty": 1e-4, "chunk_rows": 8}
    exact = linear_cross_entropy(hidden, head, labels, weights, **arguments)
    single = [tensor.detach().float().requires_grad_() for tensor in (hidden, head)]
    loss = linear_cross_entropy(*single, labels, weights, **arguments)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for ours, reference in zip(
        torch.autograd.grad(loss, single), torch.autograd.grad(exact, (hidden, head)), strict=True
    ):
        assert (ours - reference).norm() < 2e-6 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_rounded_logits_allow(dtype):
    hidden, head, labels, weights = inputs(700, torch.float32)
    half = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, head)]
    exact = [tensor.detach().double().requires_grad_() for tensor in half]
    arguments = {"normaliser": torch.tensor(1e5), "logit_penalty": 0.0, "chunk_rows": 8}
    loss = linear_cross_entropy(*half, labels, weights, **arguments)
    reference = linear_cross_entropy(*exact, labels, weights, **arguments)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-3, atol=0)
    # with the scale a gradient scaler sends; gradients divided by the normaliser first would be lost in fp16
    grads = torch.autograd.grad(loss * 65536, half)
    for grad, expected in zip(grads, torch.autograd.grad(reference * 65536, exact), strict=True):
        assert (grad.double() - expected).norm() < 6e-3 * expected.norm()


def test_a_trained_fp32_head_serves_half_precision_hidden_states():
    hidden, head, labels, weights = inputs(700, torch.float32)
    arguments = {"normaliser": torch.tensor(10.0), "logit_penalty": 1e-4, "chunk_rows": 8}
    half = hidden.detach().bfloat16().requires_grad_()
    linear_cross_entropy(half, head, labels, weights, **arguments).backward()
    linear_cross_entropy(hidden, head_copy := head.detach().requires_grad_(), labels, weights, **arguments).backward()
    assert head.grad.dtype == torch.float32
    assert (head.grad - head_copy.grad).norm() < 0.05 * head_copy.grad.norm()


def test_equal_maxima_pull_on_the_first():
    hidden = torch.ones(1, 1, 2, requires_grad=True)
    head = torch.zeros(600, 2)
    head[[130, 300, 599]] = 1.0
    head.requires_grad_()
    loss = linear_cross_entropy(
        hidden, head, torch.tensor([[-100]]), torch.zeros(1, 1),
        normaliser=torch.tensor(1.0), logit_penalty=1.0, chunk_rows=4,
    )
    (grad,) = torch.autograd.grad(loss, head)
    assert grad.abs().sum(1).nonzero().tolist() == [[130]]


def test_rows_without_weight_get_no_gradient_when_there_is_no_penalty():
    hidden, head, labels, weights = inputs()
    loss = linear_cross_entropy(
        hidden, head, labels, weights, normaliser=torch.tensor(1.0), logit_penalty=0.0, chunk_rows=4
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(grad.abs().sum(-1) == 0, weights == 0)


def test_a_batch_without_any_weight_gives_zero():
    hidden, head, labels, weights = inputs()
    loss = linear_cross_entropy(
        hidden, head, labels, weights * 0, normaliser=torch.tensor(1.0), logit_penalty=0.0, chunk_rows=4
    )
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_a_frozen_head_gets_no_gradient():
    hidden, head, labels, weights = inputs()
    head = head.detach()
    loss = linear_cross_entropy(
        hidden, head, labels, weights, normaliser=torch.tensor(1.0), logit_penalty=1e-4, chunk_rows=4
    )
    loss.backward()
    assert head.grad is None
    assert hidden.grad is not None


def test_without_gradients_the_loss_is_the_same():
    hidden, head, labels, weights = inputs()
    arguments = {"normaliser": torch.tensor(3.0), "logit_penalty": 0.1, "chunk_rows": 4}
    trained = linear_cross_entropy(hidden, head, labels, weights, **arguments)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, head, labels, weights, **arguments), trained)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_one_chunk_of_logits(dtype):
    vocabulary, rows, chunk_rows = 65536, 96, 8
    hidden = torch.randn(1, rows, 4, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, 4, dtype=dtype)
    labels = torch.randint(vocabulary, (1, rows))
    with LargestTensor() as largest:
        loss = linear_cross_entropy(
            hidden, head, labels, torch.ones(1, rows),
            normaliser=torch.tensor(float(rows)), logit_penalty=1e-4, chunk_rows=chunk_rows,
        )
        loss.backward()
    assert largest.elements == chunk_rows * vocabulary
