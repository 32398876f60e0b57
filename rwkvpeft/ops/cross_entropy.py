"""Hidden states times head to loss, a few rows of logits at a time, with the pull on the largest logit (L2Wrap).

The gradient for the hidden states is worked out in the forward pass, in the memory of the logits, so that neither
the logits nor the hidden states are kept for the backward pass. Letters: R rows (all positions of a batch), C
channels, V vocabulary.

With z = H W^T, p = softmax(z), weights w, normaliser n and R = B * T positions::

    loss = sum_r w_r (logsumexp(z_r) - z_r[y_r]) / n
    dz_r = w_r (p_r - onehot(y_r)) / n  +  (penalty / R) max(z_r) onehot(argmax z_r)

The second term is L2Wrap of BlinkDL/RWKV-LM: it moves the gradient, not the loss, acts on positions of weight 0 as
well, takes the first index of equal maxima, and scales with the incoming gradient like everything else. Label smoothing
(Szegedy et al., arXiv 1512.00567) by e replaces onehot(y) by (1 - e) onehot(y) + e / V, in the loss too.

Matrix products are PyTorch's; what is done with rows of logits is a program of ``cross_entropy_triton.py`` or
``cross_entropy_torch.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkvpeft.errors import ContractError
from rwkvpeft.ops import cross_entropy_torch
from rwkvpeft.ops.cross_entropy_torch import RowProgram, Trained, first_max

RowChoice = Literal["auto", "triton", "torch"]


class _Way(NamedTuple):
    """How the work is done: rows of logits at once, whether only the rows that count are computed, by which program."""

    chunk_rows: int
    compact: bool
    program: RowProgram


class _Rows(NamedTuple):
    """The flattened inputs of one call: (R, C), (V, C), (R,), (R,); ``wrap`` is penalty * n / R, ()."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    weights: Tensor
    wrap: Tensor | None
    smoothing: float


def row_program(choice: RowChoice, logits: Tensor) -> RowProgram:
    """What works on rows of logits such as ``logits``, of which only device and dtype are looked at.

    ``auto`` is Triton on a GPU that has it, for the dtypes it computes in; else PyTorch. Nothing is tried: a run hands
    over what ``cross_entropy_choose.py`` has found.

    Raises: ContractError for Triton where it is not installed or for fp64.
    """
    suits = logits.dtype in (torch.bfloat16, torch.float16, torch.float32) and _has_triton()
    if choice == "triton" and not suits:
        raise ContractError(f"no rows of {logits.dtype} in Triton here")
    if choice == "torch" or not suits or (choice == "auto" and logits.device.type != "cuda"):
        return cross_entropy_torch.rows
    from rwkvpeft.ops import cross_entropy_triton

    return cross_entropy_triton.rows


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    normaliser: Tensor,
    logit_penalty: float,
    chunk_rows: int,
    label_smoothing: float = 0.0,
    compact: bool = True,
    rows: RowChoice | RowProgram = "auto",
) -> Tensor:
    """Weighted cross entropy of ``hidden @ head_weight.T`` without ever holding all logits.

    Args:
        hidden: (..., C) of any floating dtype; the matrix products run in this dtype, the softmax in at least fp32.
        head_weight: (V, C), cast to the dtype of ``hidden``; its gradient is made only if it wants one.
        labels: (...) int64; where the weight is 0 any value is allowed.
        weights: (...), how much each position counts.
        normaliser: (), what the weighted sum is divided by.
        logit_penalty: strength of L2Wrap, 1e-4 in RWKV-LM; 0 for none.
        chunk_rows: rows of logits that exist at once.
        label_smoothing: share of the target that is spread over the vocabulary.
        compact: leave out rows of weight 0, which then cost nothing, or with a penalty half. Their number must be
            known for that, so that the processor waits for the device; False never waits, and computes all rows.
        rows: the program that works on rows of logits, or which; see ``row_program``.
    Returns: (), fp32 (fp64 for fp64 inputs).
    Source: ``RWKV-v7/train_temp`` of BlinkDL/RWKV-LM for the penalty.
    """
    channels = hidden.shape[-1]
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = weights.reshape(-1).to(dtype)
    normaliser = normaliser.to(device=hidden.device, dtype=dtype)
    labels = labels.reshape(-1)
    flat = hidden.reshape(-1, channels)
    program = row_program(rows, hidden) if isinstance(rows, str) else rows
    way = _Way(chunk_rows, compact, program)
    if wants_gradient:
        loss: Tensor = _LinearCrossEntropy.apply(
            flat, head_weight, labels, weights, normaliser, logit_penalty, label_smoothing, way
        )
        return loss
    inputs = _Rows(flat, head_weight.to(flat.dtype), labels, weights, None, label_smoothing)
    return _run(inputs, way, None, None) / normaliser


def head_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    weights: Tensor,
    *,
    normaliser: Tensor,
    logit_penalty: float,
    chunk_rows: int,
    label_smoothing: float = 0.0,
    compact: bool = True,
    beside: Callable[[Tensor, slice], Tensor] | None = None,
) -> Tensor:
    """``linear_cross_entropy`` for a head that is more than a matrix, as one with an adapter on it.

    The logits of a chunk are made by calling ``head`` on (rows, C), and once more in the backward pass, so that all of
    them never exist at once. Gradients reach whatever ``head`` trains.

    Args:
        beside: takes logits of (rows, V) and which of all rows they are, and gives the logits to compare. No row is
            left out then.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    weights = weights.reshape(-1).to(dtype)
    normaliser = normaliser.to(device=hidden.device, dtype=dtype)
    wrap = normaliser * (logit_penalty / max(len(flat), 1)) if logit_penalty > 0 else None
    trained = weights != 0
    # where the weight is 0 a label may be anything
    labels = labels.where(trained, 0)

    def chunk_loss(rows: Tensor, row_labels: Tensor, row_weights: Tensor, place: Tensor | slice) -> Tensor:
        logits = head(rows)
        if beside is not None:
            logits = beside(logits, cast(slice, place))
        each = F.cross_entropy(logits.to(dtype), row_labels, reduction="none", label_smoothing=label_smoothing)
        loss = (each * row_weights).sum()
        return loss if wrap is None else cast(Tensor, _Pull.apply(loss, logits, wrap))

    # 0, and part of the graph: a batch in which nothing has weight must have a backward pass too
    total = flat[:0].sum().to(dtype)
    compact = compact and wrap is None and beside is None
    for index in _chunks(trained, chunk_rows) if compact else _slices(len(flat), chunk_rows):
        part = checkpoint(chunk_loss, flat[index], labels[index], weights[index], index, use_reentrant=False)
        total = total + cast(Tensor, part)
    return total / normaliser


class _Pull(torch.autograd.Function):
    """The loss as it is; in the gradient each row's largest logit is pulled towards 0."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, wrap: Tensor) -> Tensor:
        top, index = first_max(logits)
        ctx.save_for_backward(top, index, wrap)
        ctx.vocab_size = logits.shape[1]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        top, index, wrap = ctx.saved_tensors
        pull = (top.to(wrap.dtype) * wrap * grads[0]).to(top.dtype)
        grad_logits = pull.new_zeros(len(pull), ctx.vocab_size).scatter_(1, index[:, None], pull[:, None])
        return grads[0], grad_logits, None


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes loss and gradients; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        normaliser: Tensor,
        logit_penalty: float,
        smoothing: float,
        way: _Way,
    ) -> Tensor:
        wrap = normaliser * (logit_penalty / max(hidden.shape[0], 1)) if logit_penalty > 0 else None
        rows = _Rows(hidden, head_weight.to(hidden.dtype), labels, weights, wrap, smoothing)
        # both gradients lack the factor 1 / n: in fp16 it would push them below the smallest number before the
        # loss scale, which arrives in backward, can lift them
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head_weight) if wants_head else None
        total = _run(rows, way, grad_hidden, grad_head)
        ctx.save_for_backward(grad_hidden, grad_head, normaliser)
        return total / normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, normaliser = ctx.saved_tensors
        factor = grads[0] / normaliser
        return (
            None if grad_hidden is None else grad_hidden * factor,
            None if grad_head is None else grad_head * factor,
            *(None,) * 6,
        )


def _run(rows: _Rows, way: _Way, grad_hidden: Tensor | None, grad_head: Tensor | None) -> Tensor:
    """Sum of weight * cross entropy, (); adds to the gradients that are given."""
    device_type = rows.hidden.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _run(rows, way, grad_hidden, grad_head)
    total = rows.weights.new_zeros(())
    if not way.compact:
        for place in _slices(len(rows.labels), way.chunk_rows):
            total += _trained_chunk(rows, place, way, grad_hidden, grad_head)
        return total
    trained = rows.weights != 0
    for index in _chunks(trained, way.chunk_rows):
        total += _trained_chunk(rows, index, way, grad_hidden, grad_head)
    if rows.wrap is not None:
        for index in _chunks(~trained, way.chunk_rows):
            logits = rows.hidden[index] @ rows.head.T
            _, top, top_index = way.program(logits, None, gradient=False, top=True)
            assert top is not None
            assert top_index is not None
            _add_wrap(rows, index, top, top_index, grad_hidden, grad_head)
    return total


def _slices(count: int, chunk_rows: int) -> Iterator[slice]:
    """All of ``count`` rows, at most ``chunk_rows`` at a time."""
    for start in range(0, count, chunk_rows):
        yield slice(start, min(start + chunk_rows, count))


def _chunks(wanted: Tensor, chunk_rows: int) -> Iterator[Tensor | slice]:
    """The wanted rows, at most ``chunk_rows`` at a time; slices where all rows are wanted, which copies nothing."""
    index = wanted.nonzero().squeeze(1)
    every_row = len(index) == len(wanted)
    for place in _slices(len(index), chunk_rows):
        yield place if every_row else index[place]


def _trained_chunk(
    rows: _Rows, index: Tensor | slice, way: _Way, grad_hidden: Tensor | None, grad_head: Tensor | None
) -> Tensor:
    hidden, weights = rows.hidden[index], rows.weights[index]
    logits = hidden @ rows.head.T
    gradient = grad_hidden is not None or grad_head is not None
    trained = Trained(rows.labels[index], weights, rows.smoothing)
    losses, top, top_index = way.program(logits, trained, gradient=gradient, top=rows.wrap is not None)
    assert losses is not None
    # weights are multiplied after the products: fp16 has no room below the smallest of a softmax
    if grad_hidden is not None:
        scale = weights[:, None].to(logits.dtype)
        if isinstance(index, slice):
            torch.mm(logits, rows.head, out=grad_hidden[index]).mul_(scale)
        else:
            grad_hidden[index] = (logits @ rows.head).mul_(scale)
    if grad_head is not None:
        scaled = hidden * weights[:, None].to(hidden.dtype)
        if grad_head.dtype == logits.dtype:
            grad_head.addmm_(logits.T, scaled)
        else:
            grad_head += logits.T @ scaled
    if gradient and top is not None and top_index is not None:
        _add_wrap(rows, index, top, top_index, grad_hidden, grad_head)
    return losses.sum()


def _add_wrap(
    rows: _Rows,
    index: Tensor | slice,
    top: Tensor,
    top_index: Tensor,
    grad_hidden: Tensor | None,
    grad_head: Tensor | None,
) -> None:
    assert rows.wrap is not None
    pull = (top.to(rows.wrap.dtype) * rows.wrap)[:, None]
    if grad_hidden is not None:
        grad_hidden[index] += (rows.head[top_index] * pull).to(grad_hidden.dtype)
    if grad_head is not None:
        # sums equal indices in the same order in every run, which index_add_ does not on a GPU
        grad_head.index_put_((top_index,), (rows.hidden[index] * pull).to(grad_head.dtype), accumulate=True)
