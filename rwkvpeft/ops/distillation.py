"""Hidden states times head to the loss of distillation, a few rows of logits at a time.

As in ``cross_entropy.py``, all logits never exist at once: the gradient of a plain head is worked out in the forward
pass, any other head runs once more in the backward pass. What rows are compared by is in ``divergence.py``. Letters: R
rows (all positions of a batch), C channels, V vocabulary, n the normaliser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkvpeft.ops.cross_entropy_torch import first_max
from rwkvpeft.ops.divergence import Mix, Told, compare


class Distilled(NamedTuple):
    """() each, weighted sums over the normaliser: the loss, and without gradient its divergence and cross entropy."""

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor


class _Rows(NamedTuple):
    """Flattened rows: labels (R,), weights (R,) in the dtype of the loss, the teacher's words; ``wrap`` () is what
    L2Wrap's pull is multiplied by, the normaliser included, or None."""

    labels: Tensor
    weights: Tensor
    told: Told
    wrap: Tensor | None

    def at(self, place: Tensor | slice) -> _Rows:
        return _Rows(self.labels[place], self.weights[place], self.told.at(place), self.wrap)


class _Way(NamedTuple):
    """How the work is done: rows of logits at once, whether only the rows that count are computed."""

    chunk_rows: int
    compact: bool


def linear_distillation(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    told: Told,
    *,
    mix: Mix,
    normaliser: Tensor,
    chunk_rows: int,
    compact: bool = True,
) -> Distilled:
    """The loss of ``hidden @ head_weight.T`` without ever holding all logits.

    Args:
        hidden: (..., C) of any floating dtype, in which the matrix products run.
        head_weight: (V, C), cast to the dtype of ``hidden``; its gradient is made only if it wants one.
        labels, weights: (...) int64, and how much each position counts.
        told: (..., K), (..., K), (...). Where the weight is 0, labels and these may be anything finite.
        normaliser: (), what the weighted sums are divided by.
        chunk_rows: rows of logits that exist at once.
        compact: leave out rows of weight 0, for which the processor waits for the device.
    Returns: in fp32 (fp64 for fp64 inputs).
    """
    flat, rows, normaliser = _flattened(hidden, labels, weights, told, mix, normaliser)
    way = _Way(chunk_rows, compact)
    if torch.is_grad_enabled() and (flat.requires_grad or head_weight.requires_grad):
        return Distilled(*_Linear.apply(flat, head_weight, rows, mix, normaliser, way))
    sums = _run(flat, head_weight.to(flat.dtype), rows, mix, way, None, None)
    return _distilled(sums / normaliser, mix)


def head_distillation(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    weights: Tensor,
    told: Told,
    *,
    mix: Mix,
    normaliser: Tensor,
    chunk_rows: int,
    compact: bool = True,
    beside: Callable[[Tensor, slice], Tensor] | None = None,
) -> Distilled:
    """``linear_distillation`` for a head that is more than a matrix, as one with an adapter on it.

    Args:
        beside: takes logits of (rows, V) and which of all rows they are, and gives the logits to compare. No row is
            left out then.
    """
    flat, rows, normaliser = _flattened(hidden, labels, weights, told, mix, normaliser)

    def chunk(part: Tensor, own: _Rows, place: Tensor | slice) -> tuple[Tensor, Tensor]:
        logits = head(part)
        if beside is not None:
            logits = beside(logits, cast(slice, place))
        return cast("tuple[Tensor, Tensor]", _OfLogits.apply(logits, own, mix))

    # 0, and part of the graph: a batch in which nothing has weight must have a backward pass too
    total = flat[:0].sum().to(rows.weights.dtype)
    sums = rows.weights.new_zeros(2)
    compact = compact and rows.wrap is None and beside is None
    for place in _places(rows.weights != 0, chunk_rows, compact):
        part, own = cast("tuple[Tensor, Tensor]",
                         checkpoint(chunk, flat[place], rows.at(place), place, use_reentrant=False))
        total = total + part
        sums = sums + own.detach()
    return Distilled(total / normaliser, *(sums / normaliser).unbind())


def _flattened(
    hidden: Tensor, labels: Tensor, weights: Tensor, told: Told, mix: Mix, normaliser: Tensor
) -> tuple[Tensor, _Rows, Tensor]:
    """The inputs, row by row; the normaliser in the loss's dtype."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    flat = hidden.reshape(-1, hidden.shape[-1])
    weights = weights.reshape(-1).to(dtype)
    normaliser = normaliser.to(device=hidden.device, dtype=dtype)
    pull = (1 - mix.alpha) * mix.pull
    k = told.ids.shape[-1]
    told = Told(told.ids.reshape(-1, k), told.logprobs.reshape(-1, k), told.tail.reshape(-1))
    wrap = normaliser * (pull / max(len(flat), 1)) if pull > 0 else None
    # where the weight is 0 a label may be anything
    return flat, _Rows(labels.reshape(-1).where(weights != 0, 0), weights, told, wrap), normaliser


def _distilled(sums: Tensor, mix: Mix) -> Distilled:
    """The loss of weighted sums of divergence and cross entropy, (2,)."""
    divergence, cross_entropy = sums.unbind()
    total = mix.alpha * mix.temperature**2 * divergence + (1 - mix.alpha) * cross_entropy
    return Distilled(total, divergence, cross_entropy)


class _Linear(torch.autograd.Function):
    """Forward computes the loss and its gradients; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, rows: _Rows, mix: Mix, normaliser: Tensor, way: _Way
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        # both lack the factor 1 / n, which fp16 has no room for before the loss scale arrives
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head_weight) if wants_head else None
        sums = _run(hidden, head_weight.to(hidden.dtype), rows, mix, way, grad_hidden, grad_head)
        ctx.save_for_backward(grad_hidden, grad_head, normaliser)
        found = _distilled(sums / normaliser, mix)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, normaliser = ctx.saved_tensors
        factor = grads[0] / normaliser
        return (
            None if grad_hidden is None else grad_hidden * factor,
            None if grad_head is None else grad_head * factor,
            *(None,) * 4,
        )


class _OfLogits(torch.autograd.Function):
    """Of rows of logits: the weighted sum of their losses (), and those of divergence and cross entropy (2,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: _Rows, mix: Mix) -> tuple[Tensor, Tensor]:
        sums, gradient = _chunk(logits, rows, mix, gradient=ctx.needs_input_grad[0])
        if gradient is not None:
            gradient.mul_(rows.weights[:, None].to(gradient.dtype))
            if rows.wrap is not None:
                top, index = first_max(logits)
                pull = (top.to(rows.wrap.dtype) * rows.wrap).to(gradient.dtype)
                gradient.scatter_add_(1, index[:, None], pull[:, None])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return _distilled(sums, mix).total, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def _run(
    hidden: Tensor, head: Tensor, rows: _Rows, mix: Mix, way: _Way, grad_hidden: Tensor | None, grad_head: Tensor | None
) -> Tensor:
    """Weighted sums of divergence and cross entropy, (2,); adds to the gradients that are given."""
    device_type = hidden.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _run(hidden, head, rows, mix, way, grad_hidden, grad_head)
    wants = grad_hidden is not None or grad_head is not None
    sums = rows.weights.new_zeros(2)
    compact = way.compact and not (rows.wrap is not None and wants)
    for place in _places(rows.weights != 0, way.chunk_rows, compact):
        part, own = hidden[place], rows.at(place)
        logits = part @ head.T
        found, slope = _chunk(logits, own, mix, gradient=wants)
        sums += found
        # weights are multiplied after the products: fp16 has no room below the smallest of a softmax
        weights = own.weights[:, None].to(hidden.dtype)
        if slope is not None and grad_hidden is not None:
            grad_hidden[place] = (slope @ head).mul_(weights)
        if slope is not None and grad_head is not None:
            scaled = part * weights
            if grad_head.dtype == slope.dtype:
                grad_head.addmm_(slope.T, scaled)
            else:
                grad_head += slope.T @ scaled
        if rows.wrap is not None and wants:
            _add_pull(part, head, place, logits, rows.wrap, grad_hidden, grad_head)
    return sums


def _chunk(logits: Tensor, rows: _Rows, mix: Mix, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Weighted sums of divergence and cross entropy (2,), and the gradient in the dtype of the logits, 0 where the
    weight is."""
    counted = rows.weights != 0
    divergence, cross_entropy, slope = compare(logits, rows.labels, rows.told, mix, gradient=gradient)
    weighted = torch.stack([divergence, cross_entropy]) * rows.weights
    if slope is not None:
        slope = slope.masked_fill_(~counted[:, None], 0).to(logits.dtype)
    return weighted.where(counted, 0).sum(dim=1), slope


def _add_pull(
    part: Tensor,
    head: Tensor,
    place: Tensor | slice,
    logits: Tensor,
    wrap: Tensor,
    grad_hidden: Tensor | None,
    grad_head: Tensor | None,
) -> None:
    """L2Wrap: each row's largest logit is pulled towards 0."""
    top, index = first_max(logits)
    pull = (top.to(wrap.dtype) * wrap)[:, None]
    if grad_hidden is not None:
        grad_hidden[place] += (head[index] * pull).to(grad_hidden.dtype)
    if grad_head is not None:
        # sums equal indices in the same order in every run, which index_add_ does not on a GPU
        grad_head.index_put_((index,), (part * pull).to(grad_head.dtype), accumulate=True)


def _places(counted: Tensor, chunk_rows: int, compact: bool) -> Iterator[Tensor | slice]:
    """All rows or those that count, at most ``chunk_rows`` at a time; slices where all are wanted."""
    index = counted.nonzero().squeeze(1) if compact else None
    if index is not None and len(index) < len(counted):
        yield from index.split(chunk_rows) if len(index) else ()
        return
    for start in range(0, len(counted), chunk_rows):
        yield slice(start, min(start + chunk_rows, len(counted)))
