"""The loss with its rows in Triton, against the same in PyTorch and fp64. Without a GPU the kernel is interpreted."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.errors import ContractError
from rwkvpeft.ops import cross_entropy_torch
from rwkvpeft.ops.cross_entropy import linear_cross_entropy, row_program
from rwkvpeft.ops.cross_entropy_torch import Trained

pytest.importorskip("triton")
from rwkvpeft.ops.cross_entropy_triton import rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(vocabulary, dtype=torch.float32, shape=(2, 6), channels=5):
    hidden = torch.randn(*shape, channels, device=DEVICE).to(dtype)
    head = torch.randn(vocabulary, channels, device=DEVICE).to(dtype)
    labels = torch.randint(vocabulary, shape, device=DEVICE)
    weights = torch.rand(shape, device=DEVICE) * (torch.rand(shape, device=DEVICE) > 0.4)
    return hidden, head, labels.where(weights > 0, -100), weights


def run(hidden, head, labels, weights, **settings):
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, head)]
    loss = linear_cross_entropy(
        *leaves, labels, weights, normaliser=torch.tensor(2.5, device=DEVICE), chunk_rows=5, **settings
    )
    return loss, *torch.autograd.grad(loss * 3, leaves)


def difference(ours, exact):
    return (ours.double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("vocabulary", [1, 3, 37, 700, 4096, 5003])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_both_gradients_are_those_of_the_same_in_fp64(vocabulary, penalty, smoothing):
    given = inputs(vocabulary)
    settings = {"logit_penalty": penalty, "label_smoothing": smoothing}
    exact = run(given[0].double(), given[1].double(), *given[2:], **settings, rows="torch")
    for compact in (True, False):
        ours = run(*given, **settings, compact=compact, rows="triton")
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-6, atol=1e-7)
        for grad, reference in zip(ours[1:], exact[1:], strict=True):
            torch.testing.assert_close(grad.double(), reference, rtol=0, atol=2e-6 * max(reference.abs().max(), 1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_rounded_logits_allow(dtype):
    hidden, head, labels, weights = inputs(700, dtype)
    ours = run(hidden, head, labels, weights, logit_penalty=1e-4, rows="triton")
    exact = run(hidden.double(), head.double(), labels, weights, logit_penalty=1e-4, rows="torch")
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-3, atol=0)
    assert difference(ours[1], exact[1]) < 6e-3
    assert difference(ours[2], exact[2]) < 6e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_rows_is_the_one_that_pytorch_writes(dtype):
    logits = (4 * torch.randn(6, 5003, device=DEVICE)).to(dtype)
    # one row so sure of its label that p and 1 are the same number
    logits[0, 7] = 60.0
    labels = torch.tensor([7, 0, 5002, 4095, 4096, 3], device=DEVICE)
    trained = Trained(labels, torch.ones(6, device=DEVICE), 0.0)
    exact = logits.double()
    cross_entropy_torch.rows(exact, trained, gradient=True, top=False)
    rows(logits, trained, gradient=True, top=False)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact, rtol=max(rounding, 1e-5), atol=1e-7)


def test_equal_maxima_give_the_first_index():
    logits = torch.zeros(4, 9000, device=DEVICE)
    logits[0, [4097, 5, 8999]] = 1.0
    logits[1, [8191, 4095]] = 1.0
    logits[2, 8999] = 1.0
    expected = cross_entropy_torch.first_max(logits)
    found = rows(logits, None, gradient=False, top=True)
    assert found.losses is None
    assert found.top_index.tolist() == expected[1].tolist() == [5, 4095, 8999, 0]
    assert torch.equal(found.top, expected[0])


def test_rows_that_are_not_trained_are_not_read_and_become_zeros():
    logits = torch.full((3, 50), float("nan"), device=DEVICE)
    logits[1] = torch.randn(50, device=DEVICE)
    weights = torch.tensor([0.0, 0.5, 0.0], device=DEVICE)
    labels = torch.tensor([-100, 3, 1 << 40], device=DEVICE)
    found = rows(logits, Trained(labels, weights, 0.1), gradient=True, top=False)
    assert found.losses.isfinite().all()
    assert found.losses.nonzero().tolist() == [[1]]
    assert not logits[[0, 2]].any()


def test_all_rows_keep_their_largest_logit_where_none_is_trained():
    logits = torch.randn(3, 50, device=DEVICE)
    expected = cross_entropy_torch.first_max(logits)
    untrained = Trained(torch.full((3,), -100, device=DEVICE), torch.zeros(3, device=DEVICE), 0.0)
    found = rows(logits, untrained, gradient=True, top=True)
    assert torch.equal(found.top_index, expected[1])
    assert torch.equal(found.top, expected[0])
    assert not logits.any()


@pytest.mark.parametrize("label", [-1, 50, 1 << 40])
def test_a_trained_label_that_is_no_token_makes_the_loss_nan(label):
    trained = Trained(torch.tensor([label], device=DEVICE), torch.ones(1, device=DEVICE), 0.0)
    assert rows(torch.randn(1, 50, device=DEVICE), trained, gradient=False, top=False).losses.isnan().all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_make_the_loss_nan_or_infinite(wrong):
    logits = torch.randn(1, 50, device=DEVICE)
    logits[0, 20] = wrong
    trained = Trained(torch.tensor([3], device=DEVICE), torch.ones(1, device=DEVICE), 0.0)
    assert not rows(logits, trained, gradient=True, top=True).losses.isfinite().any()


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_equal_logits_and_far_ones_do_not_overflow(scale):
    logits = torch.randn(4, 300, device=DEVICE) * scale - scale
    trained = Trained(torch.tensor([0, 1, 2, 3], device=DEVICE), torch.ones(4, device=DEVICE), 0.1)
    exact = logits.double()
    expected = cross_entropy_torch.rows(exact, trained, gradient=True, top=False).losses
    losses = rows(logits, trained, gradient=True, top=False).losses
    torch.testing.assert_close(losses.double(), expected.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-6)


def test_logits_ruled_out_by_minus_infinity_count_nothing():
    logits = torch.randn(2, 40, device=DEVICE)
    logits[:, ::2] = float("-inf")
    trained = Trained(torch.tensor([1, 3], device=DEVICE), torch.ones(2, device=DEVICE), 0.0)
    exact = logits.double()
    expected = cross_entropy_torch.rows(exact, trained, gradient=True, top=False).losses
    losses = rows(logits, trained, gradient=True, top=False).losses
    torch.testing.assert_close(losses.double(), expected.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-7)


def test_two_runs_give_the_same_bits():
    given = inputs(700, torch.bfloat16)
    first, second = (run(*given, logit_penalty=1e-2, rows="triton") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_no_rows_at_all_cost_nothing():
    given = inputs(37, shape=(0, 4))
    loss, grad, _ = run(*given, logit_penalty=1e-4, rows="triton")
    assert loss == 0
    assert grad.shape == (0, 4, 5)


def test_pytorch_knows_what_the_operator_changes_and_makes():
    arguments = (torch.randn(3, 20, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE),
                 torch.ones(3, device=DEVICE), 0.1, True, True)
    torch.library.opcheck(
        torch.ops.rwkvpeft.cross_entropy_rows_triton.default, arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_cpu_and_fp64_get_the_program_in_pytorch_unless_asked_otherwise():
    single = torch.zeros(1)
    assert row_program("auto", single) is cross_entropy_torch.rows
    assert row_program("torch", single) is cross_entropy_torch.rows
    assert row_program("triton", single) is rows
    with pytest.raises(ContractError, match="float64"):
        row_program("triton", single.double())
