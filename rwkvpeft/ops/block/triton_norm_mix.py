"""Residual add, layer norm, token shift and its mixtures in one kernel, and all their gradients in another.

Letters: B batch, T tokens, C channels, P programs. Kept for the backward pass are the residual stream, which is there
anyway, and two numbers a token: the mixtures are not, their gradients need the normed tokens alone.

With n_t the normed token and s_i the shares, mixture i is n_t (1 - s_i) + n_{t-1} s_i, so that

    dn_t = Σ_i g_i,t (1 - s_i) + Σ_i g_i,t+1 s_i          ds_i = Σ_t g_i,t (n_{t-1} - n_t)

Programs take a few neighbouring tokens each, the backward ones from the last to the first, and hand the second sum from
token to token. In a packed row two tables name the sequences that begin and end at a token; what a first token would
give to the one before it is then the gradient of its sequence's ``last`` token.

Gradients of parameters are another kernel's, launched only if they are trained: it sums over tokens within each
program, then over programs, in the same order in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.block import plain
from rwkvpeft.ops.block.contract import Mixed, Norm
from rwkvpeft.ops.block.triton_norm_mix_kernels import backward_kernel, forward_kernel, parameters_kernel
from rwkvpeft.ops.block.triton_tiles import MOST_ROWS, tokens_each
from rwkvpeft.ops.opaque import apart
from rwkvpeft.ops.sequences import Sequences

_MOST_MIXES = 6


def _six(given: Sequence[Tensor | None], filling: Tensor | None = None) -> list[Tensor | None]:
    """The kernels name six; those beyond COUNT are never touched."""
    return [*given, *[filling] * (_MOST_MIXES - len(given))]


def _warps(block: int) -> int:
    # 8 channels a thread
    return max(1, min(block // 256, 32))


@torch.library.custom_op(
    "rwkvpeft::block_norm_mix_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor? update, Tensor weight, Tensor bias, Tensor? last, Tensor?[] mixes, float eps,"
    " int rows, Tensor? starts, Tensor? ends) -> Tensor[]",
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
    rows: int,
    starts: Tensor | None,
    ends: Tensor | None,
) -> list[Tensor]:
    """Launch the forward kernel; all tensors contiguous, T > 0.

    Args:
        rows: B, of a packed row S.
        starts, ends: of ``Sequences.edges``, None unless packed.
    Returns: the mixtures, the last normed token, mean and 1 / deviation of each token fp32 (2, B, T), and with an
        update the new residual stream.
    """
    batch, tokens, channels = x.shape
    results = _empty_forward(x, update, mixes, rows)
    mixed, (after, stats) = results[: len(mixes)], results[len(mixes) : len(mixes) + 2]
    each = tokens_each(batch, tokens, programs=2048)
    block = triton.next_power_of_2(channels)
    residual = None if update is None else results[-1]
    if starts is not None:
        # sequences without tokens
        after.copy_(torch.zeros_like(after) if last is None else last)
    forward_kernel[(triton.cdiv(tokens, each), batch)](
        x, update, residual, weight, bias, last, *_six(mixes), *_six(mixed, mixed[0]), after,
        stats, starts, ends, tokens, channels, eps, each, COUNT=len(mixes), BLOCK=block, num_warps=_warps(block),
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
    rows: int,
    starts: Tensor | None,
    ends: Tensor | None,
) -> list[Tensor]:
    return _empty_forward(x, update, mixes, rows)


def _empty_forward(x: Tensor, update: Tensor | None, mixes: Sequence[Tensor | None], rows: int) -> list[Tensor]:
    batch, tokens, channels = x.shape
    results = [torch.empty_like(x) for _ in mixes]
    results += [x.new_empty(rows, channels), x.new_empty(2, batch, tokens, dtype=torch.float32)]
    return results if update is None else [*results, torch.empty_like(x)]


@torch.library.custom_op(
    "rwkvpeft::block_norm_mix_backward",
    mutates_args=(),
    schema="(Tensor residual, Tensor stats, Tensor weight, Tensor bias, Tensor? last, Tensor?[] mixes, Tensor[] grads,"
    " Tensor? grad_residual, Tensor? grad_after, bool trained, Tensor? starts, Tensor? ends) -> Tensor[]",
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
    starts: Tensor | None,
    ends: Tensor | None,
) -> list[Tensor]:
    """Launch the backward kernel; all tensors contiguous, T > 0.

    Args:
        trained: whether the norm or a mix is.
        starts, ends: of ``Sequences.edges``, None unless packed.
    Returns: the gradient of the residual stream; with a last token that of it; with trained parameters fp32
        (2 + mixes, C): of the norm's weight and bias and of the mixes.
    """
    batch, tokens, channels = residual.shape
    results = _empty_backward(residual, stats, last, mixes, trained=False)
    grad_last = None if last is None else results[1]
    if grad_last is not None and starts is not None:
        # sequences without tokens
        grad_last.copy_(torch.zeros_like(grad_last) if grad_after is None else grad_after)
    each = tokens_each(batch, tokens, programs=2048)
    block = triton.next_power_of_2(channels)
    shares, given = _six(mixes), _six(grads, grads[0])
    backward_kernel[(triton.cdiv(tokens, each), batch)](
        residual, stats, weight, *shares, *given, grad_residual, grad_after, results[0], grad_last, starts, ends,
        tokens, channels, each, COUNT=len(mixes), BLOCK=block, num_warps=_warps(block),
    )
    if not trained:
        return results
    each = tokens_each(batch, tokens, programs=256)
    programs, block = triton.cdiv(tokens, each), min(block, 512)
    partial = stats.new_empty(batch * programs, 2 + len(mixes), channels)
    parameters_kernel[(programs, batch, triton.cdiv(channels, block))](
        residual, stats, weight, bias, last, *shares, *given, grad_after, partial, starts, ends, tokens, channels,
        each, COUNT=len(mixes), BLOCK=block, num_warps=4,
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
    starts: Tensor | None,
    ends: Tensor | None,
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
        rows: int,
        starts: Tensor | None,
        ends: Tensor | None,
        *mixes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        results = norm_mix_forward(x, update, weight, bias, last, mixes, eps, rows, starts, ends)
        mixed, (after, stats) = results[: len(mixes)], results[len(mixes) : len(mixes) + 2]
        residual = x if update is None else results[-1]
        ctx.save_for_backward(residual, stats, weight, bias, last, starts, ends, *mixes)
        ctx.set_materialize_grads(False)
        # the stream passes through even where nothing is added, so that its gradient joins in the kernel
        return (x.view_as(x) if update is None else residual, after, *mixed)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_residual: Tensor | None, grad_after: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        residual, stats, weight, bias, last, starts, ends, *mixes = ctx.saved_tensors
        wanted = (*ctx.needs_input_grad[:5], *ctx.needs_input_grad[9:])
        given = [torch.zeros_like(residual) if grad is None else grad.contiguous() for grad in grads]
        results = norm_mix_backward(
            residual, stats, weight, bias, last, mixes, given,
            None if grad_residual is None else grad_residual.contiguous(),
            None if grad_after is None else grad_after.contiguous(),
            any((*wanted[2:4], *wanted[5:])), starts, ends,
        )
        grad_x, sums = results[0], results[-1]
        grad_last = results[1] if last is not None and wanted[4] else None
        of_parameters = zip((weight, bias, *mixes), (*wanted[2:4], *wanted[5:]), strict=True)
        parameters = [
            sums[row].view(parameter.shape).to(parameter.dtype) if needed else None
            for row, (parameter, needed) in enumerate(of_parameters)
        ]
        return (
            grad_x if wanted[0] else None, grad_x if wanted[1] else None, *parameters[:2], grad_last, None,
            None, None, None, *parameters[2:],
        )


def norm_mix(
    x: Tensor,
    update: Tensor | None,
    norm: Norm,
    last: Tensor | None,
    mixes: tuple[Tensor | None, ...],
    sequences: Sequences | None = None,
) -> Mixed:
    """See ``contract.NormMix``."""
    if x.numel() == 0 or len(x) > MOST_ROWS:
        return plain.norm_mix(x, update, norm, last, mixes, sequences)
    rows, starts, ends = len(x), None, None
    if sequences is not None:
        rows, (starts, ends) = len(sequences.lengths), sequences.edges(x.device)
    residual, after, *mixed = _NormMix.apply(
        x.contiguous(),
        None if update is None else update.contiguous(),
        norm.weight,
        norm.bias,
        None if last is None else last.contiguous(),
        norm.eps,
        rows,
        starts,
        ends,
        *mixes,
    )
    return Mixed(residual, tuple(mixed), after)
