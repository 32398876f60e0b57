"""v6's five mixtures of each token with its predecessor, by shares that each token has of its own.

Letters: B batch, T tokens, C channels. With the share s_i,t = mix_i + shares_i,t of the predecessor, mixture i is
x_t (1 - s_i,t) + x_{t-1} s_i,t. Programs take a few neighbouring tokens of a block of channels, the backward ones from
the last to the first. In a packed row ``starts`` names the sequence that begins at a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.block import plain
from rwkvpeft.ops.block.triton_tiles import (
    MOST_ROWS,
    load_numbered_row,
    load_optional_row,
    load_row,
    store_numbered_row,
    store_row,
    tokens_each,
)
from rwkvpeft.ops.opaque import apart
from rwkvpeft.ops.sequences import Sequences

_BLOCK = 512


@triton.jit
def _mix(out, shares, mix, offset, cols, inside, row, towards):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    share = load_row(shares, offset, cols, inside) + load_row(mix, 0, cols, inside)
    store_row(out, offset, cols, inside, row + towards * share)


@triton.jit(do_not_specialize=["T", "each"])
def _forward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x, last, shares, m0, m1, m2, m3, m4, out0, out1, out2, out3, out4, starts, T, C, each,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * each
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    first = batch * T
    size = tl.num_programs(1).to(tl.int64) * T * C
    before = load_row(x, (first + tl.maximum(start - 1, 0)) * C, cols, inside)
    before = tl.where(start > 0, before, load_optional_row(last, batch * C, cols, inside))
    for token in range(start, tl.minimum(start + each, T)):
        offset = (first + token) * C
        row = load_row(x, offset, cols, inside)
        if starts is not None:
            sequence = tl.load(starts + token)
            before = tl.where(sequence >= 0, load_numbered_row(last, sequence, C, cols), before)
        _mix(out0, shares, m0, offset, cols, inside, row, before - row)
        _mix(out1, shares + size, m1, offset, cols, inside, row, before - row)
        _mix(out2, shares + 2 * size, m2, offset, cols, inside, row, before - row)
        _mix(out3, shares + 3 * size, m3, offset, cols, inside, row, before - row)
        _mix(out4, shares + 4 * size, m4, offset, cols, inside, row, before - row)
        before = row


@triton.jit
def _spread(  # type: ignore[no-untyped-def]  # noqa: ANN202
    grad, shares, mix, offset, cols, inside, own, passed  # noqa: ANN001
):
    """Add what a mixture's gradient says of its token, and of the token before; return that gradient too."""
    row = load_row(grad, offset, cols, inside)
    part = row * (load_row(shares, offset, cols, inside) + load_row(mix, 0, cols, inside))
    return own + (row - part), passed + part, row


@triton.jit(do_not_specialize=["T", "each"])
def _backward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x, last, shares, m0, m1, m2, m3, m4, g0, g1, g2, g3, g4,  # noqa: ANN001
    grad_x, grad_last, grad_shares, partial, starts, T, C, each, BLOCK: tl.constexpr,  # noqa: ANN001
):
    batch = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    start = chunk * each
    end = tl.minimum(start + each, T)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    first = batch * T
    size = tl.num_programs(1).to(tl.int64) * T * C
    zeros = tl.zeros([BLOCK], tl.float32)
    sum0, sum1, sum2, sum3, sum4 = zeros, zeros, zeros, zeros, zeros

    # what the token after this program's last one gives to it
    passes = end < T
    if starts is not None:
        passes = tl.load(starts + end, mask=passes, other=0) < 0
    follows = cols < tl.where(passes, C, 0)
    offset = (first + end) * C
    _, passed, _ = _spread(g0, shares, m0, offset, cols, follows, zeros, zeros)
    _, passed, _ = _spread(g1, shares + size, m1, offset, cols, follows, zeros, passed)
    _, passed, _ = _spread(g2, shares + 2 * size, m2, offset, cols, follows, zeros, passed)
    _, passed, _ = _spread(g3, shares + 3 * size, m3, offset, cols, follows, zeros, passed)
    _, passed, _ = _spread(g4, shares + 4 * size, m4, offset, cols, follows, zeros, passed)
    row = load_row(x, (first + end - 1) * C, cols, inside)
    for step in range(0, end - start):
        token = end - 1 - step
        offset = (first + token) * C
        earlier = load_row(x, (first + tl.maximum(token - 1, 0)) * C, cols, inside)
        if starts is None:
            before = tl.where(token > 0, earlier, load_optional_row(last, batch * C, cols, inside))
        else:
            sequence = tl.load(starts + token)
            before = tl.where(sequence >= 0, load_numbered_row(last, sequence, C, cols), earlier)
        towards = before - row
        own, passed, grad = _spread(g0, shares, m0, offset, cols, inside, passed, zeros)
        store_row(grad_shares, offset, cols, inside, grad * towards)
        sum0 += grad * towards
        own, passed, grad = _spread(g1, shares + size, m1, offset, cols, inside, own, passed)
        store_row(grad_shares, offset + size, cols, inside, grad * towards)
        sum1 += grad * towards
        own, passed, grad = _spread(g2, shares + 2 * size, m2, offset, cols, inside, own, passed)
        store_row(grad_shares, offset + 2 * size, cols, inside, grad * towards)
        sum2 += grad * towards
        own, passed, grad = _spread(g3, shares + 3 * size, m3, offset, cols, inside, own, passed)
        store_row(grad_shares, offset + 3 * size, cols, inside, grad * towards)
        sum3 += grad * towards
        own, passed, grad = _spread(g4, shares + 4 * size, m4, offset, cols, inside, own, passed)
        store_row(grad_shares, offset + 4 * size, cols, inside, grad * towards)
        sum4 += grad * towards
        store_row(grad_x, offset, cols, inside, own)
        row = earlier
        if starts is not None:
            if grad_last is not None:
                store_numbered_row(grad_last, sequence, C, cols, passed)
            passed = tl.where(sequence >= 0, 0.0, passed)
    if starts is None and grad_last is not None:  # noqa: SIM102 where it is None, the compiler must not see inside
        if start == 0:
            store_row(grad_last, batch * C, cols, inside, passed)
    if partial is not None:
        place = (batch * tl.num_programs(0) + chunk) * 5 * C
        store_row(partial, place, cols, inside, sum0)
        store_row(partial, place + C, cols, inside, sum1)
        store_row(partial, place + 2 * C, cols, inside, sum2)
        store_row(partial, place + 3 * C, cols, inside, sum3)
        store_row(partial, place + 4 * C, cols, inside, sum4)


@torch.library.custom_op(
    "rwkvpeft::block_mix_by_token_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor? last, Tensor shares, Tensor[] mixes, Tensor? starts) -> Tensor[]",
)
@apart
def mix_by_token_forward(
    x: Tensor, last: Tensor | None, shares: Tensor, mixes: Sequence[Tensor], starts: Tensor | None
) -> list[Tensor]:
    """Launch the forward kernel; all tensors contiguous, T > 0.

    Args:
        starts: of ``Sequences.edges``, None unless packed.
    Returns: the five mixtures.
    """
    batch, tokens, channels = x.shape
    results = [torch.empty_like(x) for _ in mixes]
    each = tokens_each(batch, tokens, programs=1024)
    _forward_kernel[(triton.cdiv(tokens, each), batch, triton.cdiv(channels, _BLOCK))](
        x, last, shares, *mixes, *results, starts, tokens, channels, each, BLOCK=_BLOCK, num_warps=4
    )
    return results


@mix_by_token_forward.register_fake
def _(
    x: Tensor, last: Tensor | None, shares: Tensor, mixes: Sequence[Tensor], starts: Tensor | None
) -> list[Tensor]:
    return [torch.empty_like(x) for _ in mixes]


@torch.library.custom_op(
    "rwkvpeft::block_mix_by_token_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor? last, Tensor shares, Tensor[] mixes, Tensor[] grads, bool trained,"
    " Tensor? starts) -> Tensor[]",
)
@apart
def mix_by_token_backward(
    x: Tensor, last: Tensor | None, shares: Tensor, mixes: Sequence[Tensor], grads: Sequence[Tensor], trained: bool,
    starts: Tensor | None,
) -> list[Tensor]:
    """Launch the backward kernel; all tensors contiguous, T > 0.

    Args:
        starts: of ``Sequences.edges``, None unless packed.
    Returns: gradients of the tokens and the shares; with a last token that of it; with trained mixes theirs,
        fp32 (5, C).
    """
    batch, tokens, channels = x.shape
    results = _empty_backward(x, last, shares, trained=False)
    if last is not None and starts is not None:
        # sequences without tokens
        results[2].zero_()
    each = tokens_each(batch, tokens, programs=256 if trained else 1024)
    programs = triton.cdiv(tokens, each)
    partial = x.new_empty(batch * programs, len(mixes), channels, dtype=torch.float32) if trained else None
    _backward_kernel[(programs, batch, triton.cdiv(channels, _BLOCK))](
        x, last, shares, *mixes, *grads, results[0], results[2] if last is not None else None, results[1], partial,
        starts, tokens, channels, each, BLOCK=_BLOCK, num_warps=4,
    )
    return results if partial is None else [*results, partial.sum(0)]


@mix_by_token_backward.register_fake
def _(
    x: Tensor, last: Tensor | None, shares: Tensor, mixes: Sequence[Tensor], grads: Sequence[Tensor], trained: bool,
    starts: Tensor | None,
) -> list[Tensor]:
    return _empty_backward(x, last, shares, trained=trained)


def _empty_backward(x: Tensor, last: Tensor | None, shares: Tensor, *, trained: bool) -> list[Tensor]:
    results = [torch.empty_like(x), torch.empty_like(shares)]
    if last is not None:
        results.append(torch.empty_like(last))
    if trained:
        results.append(x.new_empty(shares.shape[0], x.shape[2], dtype=torch.float32))
    return results


class _MixByToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, last: Tensor | None, shares: Tensor, starts: Tensor | None, *mixes: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, last, shares, starts, *mixes)
        ctx.set_materialize_grads(False)
        return tuple(mix_by_token_forward(x, last, shares, mixes, starts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, last, shares, starts, *mixes = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        given = [torch.zeros_like(x) if grad is None else grad.contiguous() for grad in grads]
        grad_x, grad_shares, *rest = mix_by_token_backward(x, last, shares, mixes, given, any(wanted[4:]), starts)
        parameters = [
            rest[-1][row].view(mix.shape).to(mix.dtype) if needed else None
            for row, (mix, needed) in enumerate(zip(mixes, wanted[4:], strict=True))
        ]
        return (
            grad_x if wanted[0] else None, rest[0] if wanted[1] else None, grad_shares if wanted[2] else None,
            None, *parameters,
        )


def mix_by_token(
    x: Tensor,
    towards: Tensor | None,
    last: Tensor | None,
    shares: Tensor,
    mixes: tuple[Tensor, ...],
    sequences: Sequences | None = None,
) -> tuple[Tensor, ...]:
    """See ``contract.MixByToken``."""
    if x.numel() == 0 or len(x) > MOST_ROWS:
        return plain.mix_by_token(x, towards, last, shares, mixes, sequences)
    before = None if last is None else last.contiguous()
    starts = None if sequences is None else sequences.edges(x.device).starts
    results: tuple[Tensor, ...] = _MixByToken.apply(x.contiguous(), before, shares.contiguous(), starts, *mixes)
    return results
