"""Residual add, layer norm, token shift and its mixtures in one kernel, and all their gradients in another.

Letters: B batch, T tokens, C channels, P programs. Kept for the backward pass are the residual stream, which is there
anyway, and two numbers a token: the mixtures are not, their gradients need the normed tokens alone.

With n_t the normed token and s_i the shares, mixture i is n_t (1 - s_i) + n_{t-1} s_i, so that

    dn_t = Σ_i g_i,t (1 - s_i) + Σ_i g_i,t+1 s_i          ds_i = Σ_t g_i,t (n_{t-1} - n_t)

Programs take a few neighbouring tokens each, the backward ones from the last to the first, and hand the second sum from
token to token. Gradients of parameters are another kernel's, launched only if they are trained: it sums over tokens
within each program, then over programs, in the same order in every run.
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
from rwkvpeft.ops.block.contract import Mixed, Norm
from rwkvpeft.ops.block.triton_tiles import load_optional_row, load_row, store_row, tokens_each
from rwkvpeft.ops.opaque import apart

_MOST_MIXES = 6


@triton.jit
def _residual_row(x, update, offset, cols, inside):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = load_row(x, offset, cols, inside)
    if update is not None:
        # rounded as it is stored: the backward pass finds it so
        row = (row + load_row(update, offset, cols, inside)).to(x.dtype.element_ty).to(tl.float32)
    return row


@triton.jit
def _normed(row, weight, bias, cols, inside, C, eps):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    mean = tl.sum(row, axis=0) / C
    away = tl.where(inside, row - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(away * away, axis=0) / C + eps)
    # weight and bias are loaded for each token: they come from the cache, and the registers are needed for more warps
    return away * scale * load_row(weight, 0, cols, inside) + load_row(bias, 0, cols, inside), mean, scale


@triton.jit
def _mix(out, share, offset, cols, inside, row, towards):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    mixed = row + towards * load_optional_row(share, 0, cols, inside)
    store_row(out, offset, cols, inside, mixed)


@triton.jit(do_not_specialize=["T", "each"])
def _forward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x, update, residual, weight, bias, last, s0, s1, s2, s3, s4, s5,  # noqa: ANN001
    out0, out1, out2, out3, out4, out5, after, stats, T, C, eps, each,  # noqa: ANN001
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):
    batch = tl.program_id(1)
    start = tl.program_id(0) * each
    end = tl.minimum(start + each, T)
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    first = batch.to(tl.int64) * T
    tokens = tl.num_programs(1).to(tl.int64) * T

    row = _residual_row(x, update, (first + tl.maximum(start - 1, 0)) * C, cols, inside)
    before, _, _ = _normed(row, weight, bias, cols, inside, C, eps)
    before = tl.where(start > 0, before, load_optional_row(last, batch.to(tl.int64) * C, cols, inside))
    for token in range(start, end):
        offset = (first + token) * C
        row = _residual_row(x, update, offset, cols, inside)
        if update is not None:
            store_row(residual, offset, cols, inside, row)
        row, mean, scale = _normed(row, weight, bias, cols, inside, C, eps)
        tl.store(stats + first + token, mean)
        tl.store(stats + tokens + first + token, scale)
        towards = before - row
        _mix(out0, s0, offset, cols, inside, row, towards)
        if COUNT > 1:
            _mix(out1, s1, offset, cols, inside, row, towards)
        if COUNT > 2:
            _mix(out2, s2, offset, cols, inside, row, towards)
        if COUNT > 3:
            _mix(out3, s3, offset, cols, inside, row, towards)
        if COUNT > 4:
            _mix(out4, s4, offset, cols, inside, row, towards)
        if COUNT > 5:
            _mix(out5, s5, offset, cols, inside, row, towards)
        before = row
    if end == T:
        store_row(after, batch.to(tl.int64) * C, cols, inside, before)


@triton.jit
def _spread(grad, share, offset, cols, inside, own, passed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Add what a mixture's gradient says of its token, and of the token before."""
    row = load_row(grad, offset, cols, inside)
    part = row * load_optional_row(share, 0, cols, inside)
    return own + (row - part), passed + part


@triton.jit
def _spread_all(  # type: ignore[no-untyped-def]  # noqa: ANN202
    g0, g1, g2, g3, g4, g5, s0, s1, s2, s3, s4, s5, offset, cols, inside, own, COUNT: tl.constexpr,  # noqa: ANN001
):
    passed = cols.to(tl.float32) * 0.0
    own, passed = _spread(g0, s0, offset, cols, inside, own, passed)
    if COUNT > 1:
        own, passed = _spread(g1, s1, offset, cols, inside, own, passed)
    if COUNT > 2:
        own, passed = _spread(g2, s2, offset, cols, inside, own, passed)
    if COUNT > 3:
        own, passed = _spread(g3, s3, offset, cols, inside, own, passed)
    if COUNT > 4:
        own, passed = _spread(g4, s4, offset, cols, inside, own, passed)
    if COUNT > 5:
        own, passed = _spread(g5, s5, offset, cols, inside, own, passed)
    return own, passed


@triton.jit(do_not_specialize=["T", "each"])
def _backward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    residual, stats, weight, s0, s1, s2, s3, s4, s5, g0, g1, g2, g3, g4, g5,  # noqa: ANN001
    grad_residual, grad_after, grad_x, grad_last, T, C, each, COUNT: tl.constexpr, BLOCK: tl.constexpr,  # noqa: ANN001
):
    batch = tl.program_id(1)
    start = tl.program_id(0) * each
    end = tl.minimum(start + each, T)
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    first = batch.to(tl.int64) * T
    tokens = tl.num_programs(1).to(tl.int64) * T
    row_of_batch = batch.to(tl.int64) * C

    # what the token after this program's last one gives to it
    follows = cols < tl.where(end < T, C, 0)
    zeros = tl.zeros([BLOCK], tl.float32)
    _, passed = _spread_all(
        g0, g1, g2, g3, g4, g5, s0, s1, s2, s3, s4, s5, (first + end) * C, cols, follows, zeros, COUNT
    )
    passed += load_optional_row(grad_after, row_of_batch, cols, cols < tl.where(end == T, C, 0))
    for step in range(0, end - start):
        token = end - 1 - step
        offset = (first + token) * C
        own, passed = _spread_all(
            g0, g1, g2, g3, g4, g5, s0, s1, s2, s3, s4, s5, offset, cols, inside, passed, COUNT
        )
        own *= load_row(weight, 0, cols, inside)
        scale = tl.load(stats + tokens + first + token)
        row = (load_row(residual, offset, cols, inside) - tl.load(stats + first + token)) * scale
        own = scale * (own - tl.sum(own, axis=0) / C - row * (tl.sum(own * row, axis=0) / C))
        own += load_optional_row(grad_residual, offset, cols, inside)
        store_row(grad_x, offset, cols, inside, own)
    if grad_last is not None:  # noqa: SIM102 where it is None, the compiler must not see what is inside
        if start == 0:
            store_row(grad_last, row_of_batch, cols, inside, passed)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]  # noqa: ANN202
    grad, share, offset, cols, inside, row, before, towards, has_before, total, sum_gamma, sum_beta,  # noqa: ANN001
):
    """Add what a mixture's gradient at one token says of its share and of the norm's weight and bias."""
    given = load_row(grad, offset, cols, inside)
    part = given * load_optional_row(share, 0, cols, inside)
    sum_gamma += given * row + part * (before - row)
    sum_beta += given + part * (has_before - 1.0)
    return total + given * towards, sum_gamma, sum_beta


@triton.jit(do_not_specialize=["T", "each"])
def _parameters_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    residual, stats, weight, bias, last, s0, s1, s2, s3, s4, s5, g0, g1, g2, g3, g4, g5,  # noqa: ANN001
    grad_after, partial, T, C, each, COUNT: tl.constexpr, BLOCK: tl.constexpr,  # noqa: ANN001
):
    batch = tl.program_id(1)
    chunk = tl.program_id(0)
    start = chunk * each
    end = tl.minimum(start + each, T)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    first = batch.to(tl.int64) * T
    tokens = tl.num_programs(1).to(tl.int64) * T
    row_of_batch = batch.to(tl.int64) * C
    gamma = load_row(weight, 0, cols, inside)
    beta = load_row(bias, 0, cols, inside)
    before_all = load_optional_row(last, row_of_batch, cols, inside)
    zeros = tl.zeros([BLOCK], tl.float32)
    sum_gamma, sum_beta, sum0, sum1, sum2, sum3, sum4, sum5 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros

    # the normed token before, without weight and bias
    earlier = first + tl.maximum(start - 1, 0)
    before = load_row(residual, earlier * C, cols, inside) - tl.load(stats + earlier)
    before = tl.where(start > 0, before * tl.load(stats + tokens + earlier), 0.0)
    for token in range(start, end):
        offset = (first + token) * C
        row = (load_row(residual, offset, cols, inside) - tl.load(stats + first + token))
        row *= tl.load(stats + tokens + first + token)
        has_before = tl.where(token > 0, 1.0, 0.0)
        towards = tl.where(token > 0, before * gamma + beta, before_all) - (row * gamma + beta)
        sum0, sum_gamma, sum_beta = _gather(
            g0, s0, offset, cols, inside, row, before, towards, has_before, sum0, sum_gamma, sum_beta
        )
        if COUNT > 1:
            sum1, sum_gamma, sum_beta = _gather(
                g1, s1, offset, cols, inside, row, before, towards, has_before, sum1, sum_gamma, sum_beta
            )
        if COUNT > 2:
            sum2, sum_gamma, sum_beta = _gather(
                g2, s2, offset, cols, inside, row, before, towards, has_before, sum2, sum_gamma, sum_beta
            )
        if COUNT > 3:
            sum3, sum_gamma, sum_beta = _gather(
                g3, s3, offset, cols, inside, row, before, towards, has_before, sum3, sum_gamma, sum_beta
            )
        if COUNT > 4:
            sum4, sum_gamma, sum_beta = _gather(
                g4, s4, offset, cols, inside, row, before, towards, has_before, sum4, sum_gamma, sum_beta
            )
        if COUNT > 5:
            sum5, sum_gamma, sum_beta = _gather(
                g5, s5, offset, cols, inside, row, before, towards, has_before, sum5, sum_gamma, sum_beta
            )
        before = row
    given = load_optional_row(grad_after, row_of_batch, cols, cols < tl.where(end == T, C, 0))
    sum_gamma += given * before
    sum_beta += given

    partial += (batch.to(tl.int64) * tl.num_programs(0) + chunk) * (COUNT + 2) * C + cols
    tl.store(partial, sum_gamma, mask=inside)
    tl.store(partial + C, sum_beta, mask=inside)
    tl.store(partial + 2 * C, sum0, mask=inside)
    if COUNT > 1:
        tl.store(partial + 3 * C, sum1, mask=inside)
    if COUNT > 2:
        tl.store(partial + 4 * C, sum2, mask=inside)
    if COUNT > 3:
        tl.store(partial + 5 * C, sum3, mask=inside)
    if COUNT > 4:
        tl.store(partial + 6 * C, sum4, mask=inside)
    if COUNT > 5:
        tl.store(partial + 7 * C, sum5, mask=inside)


def _six(given: Sequence[Tensor | None], filling: Tensor | None = None) -> list[Tensor | None]:
    """The kernels name six; those beyond COUNT are never touched."""
    return [*given, *[filling] * (_MOST_MIXES - len(given))]


def _warps(block: int) -> int:
    # 8 channels a thread
    return max(1, min(block // 256, 32))


@torch.library.custom_op(
    "rwkvpeft::block_norm_mix_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor? update, Tensor weight, Tensor bias, Tensor? last, Tensor?[] mixes, float eps)"
    " -> Tensor[]",
)
@apart
def norm_mix_forward(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    last: Tensor | None,
    mixes: Sequence[Tensor | None],
    eps: float,
) -> list[Tensor]:
    """Launch the forward kernel; all tensors contiguous, T > 0.

    Returns: the mixtures, the last normed token, mean and 1 / deviation of each token fp32 (2, B, T), and with an
        update the new residual stream.
    """
    batch, tokens, channels = x.shape
    results = _empty_forward(x, update, mixes)
    mixed, (after, stats) = results[: len(mixes)], results[len(mixes) : len(mixes) + 2]
    each = tokens_each(batch, tokens, programs=2048)
    block = triton.next_power_of_2(channels)
    residual = None if update is None else results[-1]
    _forward_kernel[(triton.cdiv(tokens, each), batch)](
        x, update, residual, weight, bias, last, *_six(mixes), *_six(mixed, mixed[0]), after,
        stats, tokens, channels, eps, each, COUNT=len(mixes), BLOCK=block, num_warps=_warps(block),
    )
    return results


@norm_mix_forward.register_fake
def _(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    last: Tensor | None,
    mixes: Sequence[Tensor | None],
    eps: float,
) -> list[Tensor]:
    return _empty_forward(x, update, mixes)


def _empty_forward(x: Tensor, update: Tensor | None, mixes: Sequence[Tensor | None]) -> list[Tensor]:
    batch, tokens, channels = x.shape
    results = [torch.empty_like(x) for _ in mixes]
    results += [x.new_empty(batch, channels), x.new_empty(2, batch, tokens, dtype=torch.float32)]
    return results if update is None else [*results, torch.empty_like(x)]


@torch.library.custom_op(
    "rwkvpeft::block_norm_mix_backward",
    mutates_args=(),
    schema="(Tensor residual, Tensor stats, Tensor weight, Tensor bias, Tensor? last, Tensor?[] mixes, Tensor[] grads,"
    " Tensor? grad_residual, Tensor? grad_after, bool trained) -> Tensor[]",
)
@apart
def norm_mix_backward(
    residual: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    last: Tensor | None,
    mixes: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    grad_residual: Tensor | None,
    grad_after: Tensor | None,
    trained: bool,
) -> list[Tensor]:
    """Launch the backward kernel; all tensors contiguous, T > 0.

    Args:
        trained: whether the norm or a mix is.
    Returns: the gradient of the residual stream; with a last token that of it; with trained parameters fp32
        (2 + mixes, C): of the norm's weight and bias and of the mixes.
    """
    batch, tokens, channels = residual.shape
    results = _empty_backward(residual, stats, last, mixes, trained=False)
    grad_last = None if last is None else results[1]
    each = tokens_each(batch, tokens, programs=2048)
    block = triton.next_power_of_2(channels)
    shares, given = _six(mixes), _six(grads, grads[0])
    _backward_kernel[(triton.cdiv(tokens, each), batch)](
        residual, stats, weight, *shares, *given, grad_residual, grad_after, results[0], grad_last, tokens, channels,
        each, COUNT=len(mixes), BLOCK=block, num_warps=_warps(block),
    )
    if not trained:
        return results
    each = tokens_each(batch, tokens, programs=256)
    programs, block = triton.cdiv(tokens, each), min(block, 512)
    partial = stats.new_empty(batch * programs, 2 + len(mixes), channels)
    _parameters_kernel[(programs, batch, triton.cdiv(channels, block))](
        residual, stats, weight, bias, last, *shares, *given, grad_after, partial, tokens, channels, each,
        COUNT=len(mixes), BLOCK=block, num_warps=4,
    )
    return [*results, partial.sum(0)]


@norm_mix_backward.register_fake
def _(
    residual: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    last: Tensor | None,
    mixes: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    grad_residual: Tensor | None,
    grad_after: Tensor | None,
    trained: bool,
) -> list[Tensor]:
    return _empty_backward(residual, stats, last, mixes, trained=trained)


def _empty_backward(
    residual: Tensor, stats: Tensor, last: Tensor | None, mixes: Sequence[Tensor | None], *, trained: bool
) -> list[Tensor]:
    results = [torch.empty_like(residual)]
    if last is not None:
        results.append(torch.empty_like(last))
    if trained:
        results.append(stats.new_empty(2 + len(mixes), residual.shape[2]))
    return results


class _NormMix(torch.autograd.Function):
    """Returns the residual stream, the last normed token and the mixtures."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        update: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        last: Tensor | None,
        eps: float,
        *mixes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        results = norm_mix_forward(x, update, weight, bias, last, mixes, eps)
        mixed, (after, stats) = results[: len(mixes)], results[len(mixes) : len(mixes) + 2]
        residual = x if update is None else results[-1]
        ctx.save_for_backward(residual, stats, weight, bias, last, *mixes)
        ctx.set_materialize_grads(False)
        # the stream passes through even where nothing is added, so that its gradient joins in the kernel
        return (x.view_as(x) if update is None else residual, after, *mixed)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_residual: Tensor | None, grad_after: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        residual, stats, weight, bias, last, *mixes = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        given = [torch.zeros_like(residual) if grad is None else grad.contiguous() for grad in grads]
        results = norm_mix_backward(
            residual, stats, weight, bias, last, mixes, given,
            None if grad_residual is None else grad_residual.contiguous(),
            None if grad_after is None else grad_after.contiguous(),
            any((*wanted[2:4], *wanted[6:])),
        )
        grad_x, sums = results[0], results[-1]
        grad_last = results[1] if last is not None and wanted[4] else None
        of_parameters = zip((weight, bias, *mixes), (*wanted[2:4], *wanted[6:]), strict=True)
        parameters = [
            sums[row].view(parameter.shape).to(parameter.dtype) if needed else None
            for row, (parameter, needed) in enumerate(of_parameters)
        ]
        return (
            grad_x if wanted[0] else None, grad_x if wanted[1] else None, *parameters[:2], grad_last, None,
            *parameters[2:],
        )


def norm_mix(
    x: Tensor, update: Tensor | None, norm: Norm, last: Tensor | None, mixes: tuple[Tensor | None, ...]
) -> Mixed:
    """See ``contract.NormMix``."""
    if x.numel() == 0:
        return plain.norm_mix(x, update, norm, last, mixes)
    residual, after, *mixed = _NormMix.apply(
        x.contiguous(),
        None if update is None else update.contiguous(),
        norm.weight,
        norm.bias,
        None if last is None else last.contiguous(),
        norm.eps,
        *mixes,
    )
    return Mixed(residual, tuple(mixed), after)
