"""Hidden states times head to loss, a few rows of logits at a time, with the pull on the largest logit (L2Wrap).

The gradient for the hidden states is worked out in the forward pass, in the memory of the logits, so that neither
the logits nor the hidden states are kept for the backward pass. Letters: R rows (all positions of a batch), C
channels, V vocabulary.

With z = H W^T, p = softmax(z), weights w, normaliser n and R = B * T positions::

    loss = sum_r w_r (logsumexp(z_r) - z_r[y_r]) / n
    dz_r = w_r (p_r - onehot(y_r)) / n  +  (penalty / R) max(z_r) onehot(argmax z_r)

The second term is L2Wrap of BlinkDL/RWKV-LM: it moves the gradient, not the loss, acts on positions of weight 0 as
well, takes the first index of equal maxima, and scales with the incoming gradient like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ARGMAX_BLOCK = 256
# elements of logits worked on at once: what stays in a processor's cache, and what fills a GPU
_BLOCK_ELEMENTS = {"cpu": 1 << 18}
_BLOCK_ELEMENTS_GPU = 1 << 23


class _Rows(NamedTuple):
    """The flattened inputs of one call: (R, C), (V, C), (R,), (R,); ``wrap`` is penalty * n / R, ()."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    weights: Tensor
    wrap: Tensor | None


def linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    normaliser: Tensor,
    logit_penalty: float,
    chunk_rows: int,
) -> Tensor:
    """Weighted cross entropy of ``hidden @ head_weight.T`` without ever holding all logits.

    Args:
        hidden: (..., C) of any floating dtype; the matrix products run in this dtype, the softmax in at least fp32.
        head_weight: (V, C), cast to the dtype of ``hidden``; its gradient is made only if it wants one.
        labels: (...) int64; where the weight is 0 any value is allowed.
        weights: (...), how much each position counts; rows of weight 0 cost nothing unless there is a penalty.
        normaliser: (), what the weighted sum is divided by.
        logit_penalty: strength of L2Wrap, 1e-4 in RWKV-LM; 0 for none.
        chunk_rows: rows of logits that exist at once.
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
    if wants_gradient:
        loss: Tensor = _LinearCrossEntropy.apply(
            flat, head_weight, labels, weights, normaliser, logit_penalty, chunk_rows
        )
        return loss
    rows = _Rows(flat, head_weight.to(flat.dtype), labels, weights, None)
    return _run(rows, chunk_rows, None, None) / normaliser


def head_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    weights: Tensor,
    *,
    normaliser: Tensor,
    logit_penalty: float,
    chunk_rows: int,
) -> Tensor:
    """``linear_cross_entropy`` for a head that is more than a matrix, as one with an adapter on it.

    The logits of a chunk are made by calling ``head`` on (rows, C), and once more in the backward pass, so that all of
    them never exist at once. Gradients reach whatever ``head`` trains.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    weights = weights.reshape(-1).to(dtype)
    normaliser = normaliser.to(device=hidden.device, dtype=dtype)
    wrap = normaliser * (logit_penalty / max(len(flat), 1)) if logit_penalty > 0 else None
    trained = weights != 0
    # where the weight is 0 a label may be anything
    labels = labels.where(trained, 0)

    def chunk_loss(rows: Tensor, row_labels: Tensor, row_weights: Tensor) -> Tensor:
        logits = head(rows)
        each = F.cross_entropy(logits.to(dtype), row_labels, reduction="none")
        loss = (each * row_weights).sum()
        return loss if wrap is None else cast(Tensor, _Pull.apply(loss, logits, wrap))

    # 0, and part of the graph: a batch in which nothing has weight must have a backward pass too
    total = flat[:0].sum().to(dtype)
    for index in _chunks(trained if wrap is None else torch.ones_like(trained), chunk_rows):
        part = checkpoint(chunk_loss, flat[index], labels[index], weights[index], use_reentrant=False)
        total = total + cast(Tensor, part)
    return total / normaliser


class _Pull(torch.autograd.Function):
    """The loss as it is; in the gradient each row's largest logit is pulled towards 0."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, wrap: Tensor) -> Tensor:
        top, index = _first_max(logits)
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
        chunk_rows: int,
    ) -> Tensor:
        wrap = normaliser * (logit_penalty / max(hidden.shape[0], 1)) if logit_penalty > 0 else None
        rows = _Rows(hidden, head_weight.to(hidden.dtype), labels, weights, wrap)
        # both gradients lack the factor 1 / n: in fp16 it would push them below the smallest number before the
        # loss scale, which arrives in backward, can lift them
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head_weight) if wants_head else None
        total = _run(rows, chunk_rows, grad_hidden, grad_head)
        ctx.save_for_backward(grad_hidden, grad_head, normaliser)
        return total / normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, normaliser = ctx.saved_tensors
        factor = grads[0] / normaliser
        return (
            None if grad_hidden is None else grad_hidden * factor,
            None if grad_head is None else grad_head * factor,
            *(None,) * 5,
        )


def _run(rows: _Rows, chunk_rows: int, grad_hidden: Tensor | None, grad_head: Tensor | None) -> Tensor:
    """Sum of weight * cross entropy, (); adds to the gradients that are given."""
    total = rows.weights.new_zeros(())
    trained = rows.weights != 0
    for index in _chunks(trained, chunk_rows):
        total += _trained_chunk(rows, index, grad_hidden, grad_head)
    if rows.wrap is not None:
        for index in _chunks(~trained, chunk_rows):
            logits = rows.hidden[index] @ rows.head.T
            _add_wrap(rows, index, *_first_max(logits), grad_hidden, grad_head)
    return total


def _chunks(wanted: Tensor, chunk_rows: int) -> Iterator[Tensor | slice]:
    """The wanted rows, at most ``chunk_rows`` at a time; slices where all rows are wanted, which copies nothing."""
    index = wanted.nonzero().squeeze(1)
    every_row = len(index) == len(wanted)
    for start in range(0, len(index), chunk_rows):
        stop = min(start + chunk_rows, len(index))
        yield slice(start, stop) if every_row else index[start:stop]


def _trained_chunk(
    rows: _Rows, index: Tensor | slice, grad_hidden: Tensor | None, grad_head: Tensor | None
) -> Tensor:
    hidden, labels, weights = rows.hidden[index], rows.labels[index], rows.weights[index]
    logits = hidden @ rows.head.T
    top, top_index = _first_max(logits)
    label_logits = logits.gather(1, labels[:, None]).squeeze(1).to(weights.dtype)
    log_normaliser = _softmax_in_place(logits, top)
    loss = (weights * (log_normaliser - label_logits)).sum()
    if grad_hidden is None and grad_head is None:
        return loss
    # p - 1 of the label from its logit: the difference of rounded numbers is nothing but rounding where p is near 1
    below_one = torch.expm1(label_logits - log_normaliser)
    logits.scatter_(1, labels[:, None], below_one[:, None].to(logits.dtype))
    if grad_hidden is not None:
        grad_hidden[index] = (logits @ rows.head).mul_(weights[:, None].to(logits.dtype))
    if grad_head is not None:
        scaled = hidden * weights[:, None].to(hidden.dtype)
        if grad_head.dtype == logits.dtype:
            grad_head.addmm_(logits.T, scaled)
        else:
            grad_head += logits.T @ scaled
    if rows.wrap is not None:
        _add_wrap(rows, index, top, top_index, grad_hidden, grad_head)
    return loss


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
        grad_head.index_add_(0, top_index, (rows.hidden[index] * pull).to(grad_head.dtype))


def _first_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest entry of each row and its first index, (R,) each.

    A maximum over blocks, then one inside the best block: several times faster on a CPU than one with an index.
    """
    whole = logits.shape[1] // _ARGMAX_BLOCK * _ARGMAX_BLOCK
    if whole == 0:
        return logits.max(dim=1)
    blocks = logits[:, :whole].unflatten(1, (-1, _ARGMAX_BLOCK))
    top, block = blocks.amax(dim=2).max(dim=1)
    best = blocks.gather(1, block[:, None, None].expand(-1, 1, _ARGMAX_BLOCK)).squeeze(1)
    index = block * _ARGMAX_BLOCK + best.argmax(dim=1)
    if whole < logits.shape[1]:
        tail_top, tail_index = logits[:, whole:].max(dim=1)
        in_tail = tail_top > top
        index = torch.where(in_tail, tail_index + whole, index)
        top = torch.where(in_tail, tail_top, top)
    return top, index


def _softmax_in_place(logits: Tensor, top: Tensor) -> Tensor:
    """Turn each row into its softmax; return log(sum(exp(row))), (R,), in fp32 or fp64.

    ``top`` holds the rows' maxima. 16-bit rows pass through an fp32 buffer of a few rows.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    top = top.to(dtype)
    sums = torch.empty_like(top)
    step = max(_BLOCK_ELEMENTS.get(logits.device.type, _BLOCK_ELEMENTS_GPU) // logits.shape[1], 1)
    buffer = None
    if logits.dtype != dtype:
        buffer = torch.empty(min(step, len(logits)), logits.shape[1], dtype=dtype, device=logits.device)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        part = logits[rows] if buffer is None else buffer[: len(logits[rows])].copy_(logits[rows])
        part.sub_(top[rows, None]).exp_()
        torch.sum(part, dim=1, out=sums[rows])
        part.div_(sums[rows, None])
        if buffer is not None:
            logits[rows] = part
    return top + sums.log_()
