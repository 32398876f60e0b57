"""Cross entropy of rows of logits and its gradient in their place: what such programs promise, and one in PyTorch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_ARGMAX_BLOCK = 256
# elements of logits worked on at once: what stays in a processor's cache, and what fills a GPU
_BLOCK_ELEMENTS = {"cpu": 1 << 18}
_BLOCK_ELEMENTS_GPU = 1 << 23


class Trained(NamedTuple):
    """What rows of logits are compared with: labels (R,) int64 and weights (R,), in the dtype of the losses.

    A row of weight 0 is not trained: its label may be anything. ``smoothing`` is the share of the target that is
    spread over the whole vocabulary.
    """

    labels: Tensor
    weights: Tensor
    smoothing: float


class RowResult(NamedTuple):
    """Weighted losses (R,); the largest logit of each row (R,), in the dtype of the logits, and its first index (R,).

    Those of the largest logit are None where they were not asked for, the losses where nothing is trained.
    """

    losses: Tensor | None
    top: Tensor | None
    top_index: Tensor | None


class RowProgram(Protocol):
    """Computes with whole rows of logits."""

    def __call__(self, logits: Tensor, trained: Trained | None, *, gradient: bool, top: bool) -> RowResult:
        """Work on ``logits`` (R, V), which is contiguous and may be used up.

        Args:
            gradient: put softmax - target in the place of the logits; zeros in rows that are not trained.
            top: whether to find the largest logits, before that.
        """
        ...


def rows(logits: Tensor, trained: Trained | None, *, gradient: bool, top: bool) -> RowResult:
    """See ``RowProgram``; any floating dtype, on any device."""
    largest, index = first_max(logits) if top else (logits.amax(dim=1), None)
    if trained is None:
        return RowResult(None, largest, index)
    weights, smoothing = trained.weights, trained.smoothing
    counted = weights != 0
    labels = trained.labels.where(counted, 0)
    label_logits = logits.gather(1, labels[:, None]).squeeze(1).to(weights.dtype)
    means = logits.mean(dim=1, dtype=weights.dtype) if smoothing else None
    log_normaliser = _softmax_in_place(logits, largest, counted)
    losses = log_normaliser - label_logits
    if means is not None:
        losses = losses.lerp(log_normaliser - means, smoothing)
    losses = (losses * weights).where(counted, 0)
    if gradient:
        # p - 1 of the label from its logit: the difference of rounded numbers is nothing but rounding where p is near 1
        below_one = torch.expm1(label_logits - log_normaliser)
        if smoothing:
            spread = smoothing / logits.shape[1]
            logits.sub_((spread * counted)[:, None].to(logits.dtype))
            below_one += smoothing - spread
        logits.scatter_(1, labels[:, None], below_one.where(counted, 0)[:, None].to(logits.dtype))
    return RowResult(losses, largest if top else None, index)


def first_max(logits: Tensor) -> tuple[Tensor, Tensor]:
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


def _softmax_in_place(logits: Tensor, top: Tensor, counted: Tensor) -> Tensor:
    """Turn each row into its softmax, or into zeros; return log(sum(exp(row))), (R,), in fp32 or fp64.

    Args:
        top: the rows' maxima.
        counted: (R,), False where a row becomes zeros.

    16-bit rows pass through an fp32 buffer of a few rows.
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
        part.mul_((counted[rows] / sums[rows])[:, None])
        if buffer is not None:
            logits[rows] = part
    return top + sums.log_()
