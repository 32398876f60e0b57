"""The cross entropy of rows of logits, and its gradient in their place, as a Triton kernel.

One program per row. The first pass keeps, for each place of a block, the largest logit so far, its index, and the sum
of exponentials relative to it; they are put together once, at the end of the row, so that no pass waits for another
thread. The second pass reads the row again and writes the gradient over it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvpeft.ops.cross_entropy_torch import RowResult, Trained
from rwkvpeft.ops.opaque import apart

_BLOCK = 4096
# below every logit, and finite: the difference of two infinities is not a number
_LOWEST = tl.constexpr(-3.0e38)
_NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _minus_one(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """exp(x) - 1 for x <= 0, exact to fp32's last bits near 0 too."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))))
    return tl.where(x > -0.35, series, tl.exp(x) - 1)


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    logits, labels, weights, losses, tops, indices, V, smoothing,  # noqa: ANN001
    GRADIENT: tl.constexpr, TOP: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * V
    places = tl.arange(0, BLOCK)
    weight = 0.0
    label = -1
    if weights is not None:
        weight = tl.load(weights + row)
    trained = weight != 0
    label_logit = 0.0
    if weights is not None:
        given = tl.load(labels + row)
        # a label that is no token makes the loss NaN, which stops the run; it must not read another row
        known = trained & (given >= 0) & (given < V)
        label_logit = tl.load(line + given, mask=known, other=float("nan")).to(tl.float32)
        label = given.to(tl.int32)

    best = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    plain = tl.zeros((BLOCK,), tl.float32)
    # a row that is not trained has no columns to compute with
    counted = tl.where(trained, V, 0)
    for start in range(0, V if TOP else counted, BLOCK):
        cols = start + places
        z = tl.load(line + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        # whichever of the two is smaller counts by this factor
        factor = tl.exp(-tl.abs(z - best))
        larger = z > best
        total = tl.where(larger, total * factor + 1, total + factor)
        if TOP:
            at = tl.where(larger, cols, at)
        if SMOOTH:
            plain += tl.where(cols < V, z, 0.0)
        best = tl.where(larger, z, best)
    top = tl.max(best, axis=0)
    if TOP:
        tl.store(tops + row, top.to(tops.dtype.element_ty))
        tl.store(indices + row, tl.min(tl.where(best == top, at, _NO_INDEX), axis=0).to(tl.int64))
    if weights is not None:
        sums = tl.sum(total * tl.exp(best - top), axis=0)
        log_sums = tl.log(sums)
        loss = top - label_logit
        if SMOOTH:
            loss += smoothing * (label_logit - tl.sum(plain, axis=0) / V)
        tl.store(losses + row, tl.where(trained, weight * (loss + log_sums), 0.0))
        if GRADIENT:
            spread = smoothing / V
            at_label = _minus_one((label_logit - top) - log_sums)
            scale = 1 / sums
            if SMOOTH:
                at_label += smoothing - spread
            for start in range(0, V, BLOCK):
                cols = start + places
                z = tl.load(line + cols, mask=cols < counted, other=0.0).to(tl.float32)
                dz = tl.exp(z - top) * scale
                if SMOOTH:
                    dz -= spread
                dz = tl.where(cols < counted, tl.where(cols == label, at_label, dz), 0.0)
                tl.store(line + cols, dz.to(logits.dtype.element_ty), mask=cols < V)


@torch.library.custom_op(
    "rwkvpeft::cross_entropy_rows_triton",
    mutates_args={"logits"},
    schema="(Tensor(a0!) logits, Tensor? labels, Tensor? weights, float smoothing, bool gradient, bool top)"
    " -> (Tensor, Tensor, Tensor)",
)
@apart
def _launch(
    logits: Tensor, labels: Tensor | None, weights: Tensor | None, smoothing: float, gradient: bool, top: bool
) -> tuple[Tensor, Tensor, Tensor]:
    made = _outputs(logits, labels, weights, smoothing, gradient, top)
    vocabulary = logits.shape[1]
    if len(logits):
        _rows_kernel[(len(logits),)](
            logits, labels, weights, *made, vocabulary, smoothing,
            GRADIENT=gradient, TOP=top, SMOOTH=smoothing != 0,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=8,
        )
    return made


@_launch.register_fake
def _outputs(
    logits: Tensor, labels: Tensor | None, weights: Tensor | None, smoothing: float, gradient: bool, top: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty(0 if weights is None else len(logits), dtype=torch.float32),
        logits.new_empty(len(logits) if top else 0),
        logits.new_empty(len(logits) if top else 0, dtype=torch.int64),
    )


def rows(logits: Tensor, trained: Trained | None, *, gradient: bool, top: bool) -> RowResult:
    """See ``RowProgram``; rows of bf16, fp16 or fp32, with fp32 inside.

    Two runs give the same bits. Nothing waits for the device.
    """
    if trained is None:
        losses, tops, indices = _launch(logits, None, None, 0.0, gradient, top)
    else:
        labels, weights = trained.labels.contiguous(), trained.weights.contiguous()
        losses, tops, indices = _launch(logits, labels, weights, trained.smoothing, gradient, top)
    return RowResult(None if trained is None else losses, tops if top else None, indices if top else None)
