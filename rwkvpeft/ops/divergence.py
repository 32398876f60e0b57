"""How far rows of logits are from what a teacher says, and from the data's own tokens; with the gradient.

Letters: R rows, V vocabulary, K tokens that the teacher tells apart. With the student's logits z, its probabilities q
at temperature T, the teacher's p for its K likeliest tokens and what it leaves for all others, p_tail::

    loss = alpha T^2 D + (1 - alpha) H,        H = cross entropy with the data's token, smoothed
    tail       D = sum_K p ln(p / q) + p_tail ln(p_tail / q_tail)
    reverse    D = sum_K q ln(q / p) + q_tail ln(q_tail / p_tail)
    renorm     D = sum_K p' ln(p' / q'),       p', q' = p, q over their sums over the K tokens
    student    D = sum_K p' ln(p' / q)

Putting tokens together can only lower a divergence, so that ``tail`` and ``reverse`` are bounds from below of those
over the whole vocabulary, and equal to them for K = V (the data-processing inequality: Cover and Thomas, Elements of
Information Theory, 2.8). The student's tail is summed over its own tokens, never taken as 1 - sum q, which is nothing
but rounding where the K tokens hold nearly everything. With u = z / T the gradients dD / du are::

    tail       q - p for the K tokens, q - p_tail q / q_tail for the others
    reverse    q (s - D) with s the logarithm of the own token's or the tail's ratio
    renorm     q' - p' for the K tokens, 0 for the others
    student    q - p' for the K tokens, q for the others

Source: distillation at a temperature, with the factor T^2: Hinton et al., arXiv 1503.02531.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DivergenceKind = Literal["tail", "renorm", "student", "reverse"]

# a probability that is 0 after rounding, as a logarithm: far below any that a softmax in fp32 gives
_LEAST = -1e4


class Told(NamedTuple):
    """What a teacher says of rows: ``ids`` (R, K) of any whole type, ``logprobs`` (R, K) over the whole vocabulary at
    the temperature of the comparison, ``tail`` (R,), the logarithm of what is left for all others, -inf for nothing.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    def at(self, place: Tensor | slice) -> Told:
        """Some of the rows."""
        return Told(self.ids[place], self.logprobs[place], self.tail[place])


class Likeliest(NamedTuple):
    """The likeliest tokens of rows, for several temperatures.

    ``ids`` (R, K) int64, the likeliest first; ``logprobs`` (R, K) at temperature 1, over the whole vocabulary. Row i of
    ``normalisers`` and ``tails`` (temperatures, R): at that temperature T, logprobs / T - normaliser are the tokens'
    log-probabilities, and the tail is that of all others together.
    """

    ids: Tensor
    logprobs: Tensor
    normalisers: Tensor
    tails: Tensor


@dataclass(frozen=True)
class Mix:
    """What is compared, and how it counts: see the module. ``smoothing`` is the share of the data's token that is
    spread over the vocabulary; ``pull`` is L2Wrap's on each row's largest logit (see ``cross_entropy.py``), which
    belongs to the cross entropy and so counts by 1 - alpha."""

    kind: DivergenceKind = "tail"
    alpha: float = 0.5
    temperature: float = 2.0
    smoothing: float = 0.0
    pull: float = 0.0


class Compared(NamedTuple):
    """Of each row the divergence and the cross entropy, (R,), and the loss's gradient for its logits, (R, V)."""

    divergence: Tensor
    cross_entropy: Tensor
    gradient: Tensor | None


def likeliest(logits: Tensor, k: int, temperatures: Sequence[float] = (1.0,)) -> Likeliest:
    """The ``k`` likeliest tokens of each row of logits (R, V), and what all others have together."""
    logits = logits.to(_accurate(logits))
    top, ids = logits.topk(k, dim=1)
    whole = logits.logsumexp(dim=1)
    rest = logits.scatter(1, ids, -math.inf)
    normalisers, tails = [], []
    for temperature in temperatures:
        warm = whole if temperature == 1 else (logits / temperature).logsumexp(dim=1)
        normalisers.append(warm - whole / temperature)
        tails.append((rest / temperature).logsumexp(dim=1) - warm)
    return Likeliest(ids, top - whole[:, None], torch.stack(normalisers), torch.stack(tails))


def compare(logits: Tensor, labels: Tensor, told: Told, mix: Mix, *, gradient: bool) -> Compared:
    """Compare rows of logits with a teacher and with the data's tokens.

    Args:
        logits: (R, V) of any floating dtype; the work is done in fp32, in fp64 for fp64.
        labels: (R,) int64, the data's tokens.
        told: what the teacher says; rounded probabilities are scaled to a sum of 1 where it is to be 1.
        gradient: whether to work out the loss's gradient, of each row alone, without the pull on the largest logit.
    """
    z = logits.to(_accurate(logits))
    told = Told(told.ids.long(), told.logprobs.to(z.dtype), told.tail.to(z.dtype))
    # handed over without a name of its own: it is as large as the logits, and not needed afterwards
    divergence, slope = _divergence(z if mix.temperature == 1 else z / mix.temperature, told, mix.kind, gradient)
    cross_entropy, plain_slope = _cross_entropy(z, labels, mix.smoothing, gradient and mix.alpha < 1)
    if slope is not None:
        slope.mul_(mix.alpha * mix.temperature)
        if plain_slope is not None:
            slope.add_(plain_slope, alpha=1 - mix.alpha)
    return Compared(divergence, cross_entropy, slope)


def _divergence(u: Tensor, told: Told, kind: DivergenceKind, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The divergence (R,), and its gradient for ``u`` (R, V)."""
    ids, p, tail = told
    if kind == "renorm":
        p = p.log_softmax(dim=1)
        q = u.gather(1, ids).log_softmax(dim=1)
        found = (p.exp() * (p - q)).sum(dim=1)
        return found, torch.zeros_like(u).scatter_(1, ids, q.exp() - p.exp()) if gradient else None
    whole = u.logsumexp(dim=1)
    q = u.gather(1, ids) - whole[:, None]
    if kind == "student":
        p = p.log_softmax(dim=1)
        found = (p.exp() * (p - q)).sum(dim=1)
        return found, _softmax(u, whole).scatter_(1, ids, q.exp() - p.exp()) if gradient else None
    mass = torch.logaddexp(p.logsumexp(dim=1), tail)
    p, tail = p - mass[:, None], tail - mass
    others = u.scatter(1, ids, -math.inf).logsumexp(dim=1)
    q_tail = others - whole
    if kind == "tail":
        found = (p.exp() * (p - q)).sum(dim=1) + _times(tail, tail, q_tail)
        return found, _tail_gradient(u, Told(ids, p, tail), q, whole, others) if gradient else None
    p, tail = p.clamp_min(_LEAST), tail.clamp_min(_LEAST)
    found = (q.exp() * (q - p)).sum(dim=1) + _times(q_tail, q_tail, tail)
    if not gradient:
        return found, None
    tail_factor = (q_tail - tail).clamp_min(_LEAST) - found
    slope = _softmax(u, whole).mul_(tail_factor[:, None])
    return found, slope.scatter_(1, ids, q.exp() * (q - p - found[:, None]))


def _tail_gradient(u: Tensor, told: Told, q: Tensor, whole: Tensor, others: Tensor) -> Tensor:
    """q - p of the K tokens; of each other one its q less its part of the teacher's tail."""
    # p_tail q / q_tail from one exponential: q_tail alone may be 0 after rounding. Without a tail nothing is taken off
    shift = (others - told.tail).where(told.tail.isfinite() & others.isfinite(), math.inf)
    slope = _softmax(u, whole).sub_((u - shift[:, None]).exp_())
    return slope.scatter_(1, told.ids, q.exp() - told.logprobs.exp())


def _times(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """exp(weight) * (first - second), 0 where the weight is."""
    return (weight.exp() * (first - second)).where(weight > -math.inf, 0)


def _softmax(logits: Tensor, whole: Tensor) -> Tensor:
    """A softmax in memory of its own; ``whole`` (R,) are the logarithms of the rows' sums."""
    return (logits - whole[:, None]).exp_()


def _cross_entropy(z: Tensor, labels: Tensor, smoothing: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The cross entropy (R,), and its gradient (R, V)."""
    whole = z.logsumexp(dim=1)
    own = z.gather(1, labels[:, None]).squeeze(1)
    found = whole - own
    if smoothing:
        found = found.lerp(whole - z.mean(dim=1), smoothing)
    if not gradient:
        return found, None
    spread = smoothing / z.shape[1]
    slope = _softmax(z, whole)
    if smoothing:
        slope.sub_(spread)
    # p - 1 as one function: the difference of rounded numbers is nothing but rounding where p is near 1
    own_slope = torch.expm1(own - whole) + (smoothing - spread)
    return found, slope.scatter_(1, labels[:, None], own_slope[:, None])


def _accurate(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
