"""Hidden states times head to the log-probability of each label, a few rows of logits at a time.

What is made of the log-probabilities is not known yet when they are computed: a preference loss weighs all tokens of an
answer by a number that depends on all of them. But the gradient of one row's log-probability is a row vector that does
not depend on it, so that for a frozen head it is worked out with the logits in the forward pass and multiplied by
that number in the backward pass: two matrix products instead of three, and what is kept is as large as the hidden
states that would have to be kept otherwise. A trained head needs the numbers before rows are added up: there the
logits are made once more in the backward pass.

With z = W h / temperature, p = softmax(z) and a label y::

    log p[y] = z[y] - logsumexp(z),    d log p[y] / dh = W^T (onehot(y) - p) / temperature

Letters: N rows (all positions of a batch), C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rwkvpeft.ops.cross_entropy import RowChoice, row_program
from rwkvpeft.ops.cross_entropy_torch import RowProgram, Trained

Head = Tensor | Callable[[Tensor], Tensor]
"""A weight (V, C), or what makes logits (rows, V) of hidden states (rows, C)."""


class TokenLogprobs(NamedTuple):
    """Of each row, (N,) each in fp32 (fp64 for fp64), 0 for rows that are left out.

    ``logprobs`` are differentiable. ``collision`` is the logarithm of the sum of all tokens' squared probabilities,
    ``entropy`` is in nats; both are without gradient, and None where they were not asked for.
    """

    logprobs: Tensor
    collision: Tensor | None = None
    entropy: Tensor | None = None


class _Asked(NamedTuple):
    """What is to be computed, and how: ``program`` is None where it cannot give what is asked for."""

    temperature: float
    collision: bool
    entropy: bool
    chunk_rows: int
    program: RowProgram | None


class _Rows(NamedTuple):
    """Rows that are computed: hidden states (R, C), labels (R,), and which of them count (R,)."""

    hidden: Tensor
    labels: Tensor
    counted: Tensor


def token_logprobs(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    chunk_rows: int,
    weights: Tensor | None = None,
    compact: bool = True,
    temperature: float = 1.0,
    collision: bool = False,
    entropy: bool = False,
    rows: RowChoice | RowProgram = "auto",
    beside: Callable[[Tensor, slice], Tensor] | None = None,
) -> TokenLogprobs:
    """The log-probability of each label, without ever holding all logits.

    Args:
        hidden: (..., C) of any floating dtype; the matrix products run in this dtype, the softmax in at least fp32.
        head: a weight, cast to the dtype of ``hidden``, or anything to be called; gradients reach what it trains.
        labels: (...) int64; where the weight is 0 any value is allowed.
        chunk_rows: rows of logits that exist at once, in the forward and in the backward pass.
        weights: (...), rows of weight 0 are left out: their figures are 0. They are not multiplied with.
        compact: do not compute rows of weight 0, whose number must be known for that, so that the processor waits for
            the device; False never waits, and computes all rows.
        temperature: what logits are divided by.
        collision, entropy: what else is wanted, see ``TokenLogprobs``.
        rows: the program that works on rows of logits, or which; see ``cross_entropy.row_program``. A head that is
            called, a temperature other than 1 and what else is wanted are computed by PyTorch.
        beside: takes logits of (rows, V) and which of all rows they are, and gives the logits to use. No row is left
            out then.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    labels = labels.reshape(-1)
    counted = torch.ones_like(labels, dtype=torch.bool) if weights is None else weights.reshape(-1) != 0
    # where the weight is 0 a label may be anything
    part = _Rows(flat, labels.where(counted, 0), counted)
    index = counted.nonzero().squeeze(1) if compact and weights is not None and beside is None else None
    if index is not None:
        part = _Rows(*(x[index] for x in part))
    asked = _Asked(temperature, collision, entropy, chunk_rows, None)
    if isinstance(head, Tensor) and beside is None:
        if temperature == 1 and not collision and not entropy:
            asked = asked._replace(program=row_program(rows, flat) if isinstance(rows, str) else rows)
        found = TokenLogprobs(*_OfWeight.apply(part.hidden, head, part.labels, part.counted, asked))
    else:
        called = (lambda x: F.linear(x, head.to(x.dtype))) if isinstance(head, Tensor) else head
        found = _of_called(part, called, asked, beside)
    if index is None:
        return found
    spread = (x if x is None else x.new_zeros(len(flat)).index_put((index,), x) for x in found)
    return TokenLogprobs(*cast(tuple[Tensor, ...], tuple(spread)))


class _OfWeight(torch.autograd.Function):
    """For a frozen weight the forward pass makes each row's gradient; for a trained one the backward pass does."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, counted: Tensor, asked: _Asked
    ) -> tuple[Tensor | None, ...]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        part = _Rows(hidden, labels, counted)
        kept = torch.empty_like(hidden) if wants_hidden and not wants_head else None
        figures = []
        weight = head.to(hidden.dtype)
        with _without_autocast(hidden):
            for place in _slices(len(hidden), asked.chunk_rows):
                logits = hidden[place] @ weight.T
                found, pull = _work(logits, part, place, asked, gradient=kept is not None)
                figures.append(found)
                if kept is not None:
                    assert pull is not None
                    torch.mm(pull, weight, out=kept[place])
        ctx.asked = asked
        ctx.save_for_backward(kept, *((hidden, head, labels, counted) if wants_head else ()))
        found = _joined(figures, hidden)
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors = -grads[0] / ctx.asked.temperature
        kept, *saved = ctx.saved_tensors
        if not saved:
            return (kept * factors[:, None]).to(kept.dtype), None, None, None, None
        hidden, head, labels, counted = saved
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head)
        weight = head.to(hidden.dtype)
        part = _Rows(hidden, labels, counted)
        # factors hold the loss scale of fp16, which leaves no room for a product with them before it is summed up
        largest = factors.abs().max() if len(factors) else factors.new_ones(())
        shares = factors / largest.where(largest > 0, 1)
        with _without_autocast(hidden):
            for place in _slices(len(hidden), ctx.asked.chunk_rows):
                _, pull = _work(hidden[place] @ weight.T, part, place, ctx.asked, gradient=True)
                assert pull is not None
                if grad_hidden is not None:
                    grad_hidden[place] = (pull @ weight) * factors[place, None]
                grad_head += (pull.T @ (hidden[place] * shares[place, None].to(hidden.dtype))).to(head.dtype)
        return grad_hidden, grad_head.mul_(largest), None, None, None


def _work(
    logits: Tensor, part: _Rows, place: slice, asked: _Asked, *, gradient: bool
) -> tuple[TokenLogprobs, Tensor | None]:
    """Figures of a chunk of rows, and if asked for softmax - onehot, the gradient of minus the log-probability by the
    logits over their temperature, (rows, V), zeros where a row does not count. ``logits`` are used up."""
    labels, counted = part.labels[place], part.counted[place]
    if asked.program is not None:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        trained = Trained(labels, counted.to(dtype), 0.0)
        losses = asked.program(logits, trained, gradient=gradient, top=False).losses
        assert losses is not None
        return TokenLogprobs(-losses), logits
    found, log_softmax = _figures(logits, labels, counted, asked)
    if not gradient:
        return found, None
    # p - 1 of the label from its logarithm: the difference of rounded numbers is nothing but rounding where p is near 1
    pull = log_softmax.exp_().scatter_(1, labels[:, None], torch.expm1(found.logprobs)[:, None])
    return found, pull.mul_(counted[:, None]).to(logits.dtype)


def _figures(logits: Tensor, labels: Tensor, counted: Tensor, asked: _Asked) -> tuple[TokenLogprobs, Tensor]:
    """Figures of rows of logits (rows, V), and the logarithm of their softmax in fp32 or fp64."""
    log_softmax = _scaled(logits, asked.temperature).log_softmax(dim=1)
    collision = entropy = None
    with torch.no_grad():
        if asked.collision:
            collision = (2 * log_softmax).logsumexp(dim=1).where(counted, 0)
        if asked.entropy:
            entropy = torch.special.entr(log_softmax.exp()).sum(dim=1).where(counted, 0)
    own = log_softmax.gather(1, labels[:, None]).squeeze(1).where(counted, 0)
    return TokenLogprobs(own, collision, entropy), log_softmax


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1 else wide / temperature


def _of_called(
    part: _Rows, head: Callable[[Tensor], Tensor], asked: _Asked, beside: Callable[[Tensor, slice], Tensor] | None
) -> TokenLogprobs:
    """Autograd through whatever ``head`` is; the logits of a chunk are made once more in the backward pass."""

    def chunk(rows: Tensor, labels: Tensor, counted: Tensor, place: slice) -> TokenLogprobs:
        logits = head(rows)
        if beside is not None:
            logits = beside(logits, place)
        return _figures(logits, labels, counted, asked)[0]

    figures = []
    for place in _slices(len(part.labels), asked.chunk_rows):
        found = checkpoint(chunk, *(x[place] for x in part), place, use_reentrant=False)
        figures.append(cast(TokenLogprobs, found))
    return _joined(figures, part.hidden)


def _joined(figures: Sequence[TokenLogprobs], hidden: Tensor) -> TokenLogprobs:
    """The chunks' figures one behind another; of no row nothing, but part of the graph."""
    if not figures:
        nothing = hidden.sum(dim=1).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        return TokenLogprobs(nothing, nothing.detach(), nothing.detach())
    columns = (None if column[0] is None else torch.cat(column) for column in zip(*figures, strict=True))
    return TokenLogprobs(*cast(tuple[Tensor, ...], tuple(columns)))


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _slices(count: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, count, chunk_rows):
        yield slice(start, min(start + chunk_rows, count))
