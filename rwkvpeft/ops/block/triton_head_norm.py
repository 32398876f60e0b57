"""The end of the time mixing in one kernel: group norm in each head, v7's bonus, and the gate.

Letters: B batch, T tokens, C channels, H heads, N head size. A program works on some tokens of one head. Kept for the
backward pass are the inputs alone: a head's mean and deviation come from numbers that it reads anyway. Sums over tokens
for parameters are made within each program, then over programs: in the same order in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.block import plain
from rwkvpeft.ops.block.contract import Norm
from rwkvpeft.ops.block.triton_tiles import HeadTiles, head_tile, load_row, load_tile, store_row, store_tile
from rwkvpeft.ops.opaque import apart


@triton.jit
def _normalised(read, offsets, mask, N, eps):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Each token's head with mean 0 and variance 1, and 1 / deviation."""
    tile = load_tile(read, offsets, mask)
    away = tl.where(mask, tile - (tl.sum(tile, axis=1) / N)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(away * away, axis=1) / N + eps)
    return away * scale[:, None], scale


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    read, r, k, v, gate, weight, bias, r_k, out, tokens, C, N, eps,  # noqa: ANN001
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    head = tl.program_id(1)
    cols = tl.arange(0, COLS)
    offsets, mask = head_tile(tl.program_id(0), head, tokens, C, N, ROWS, COLS)
    normed, _ = _normalised(read, offsets, mask, N, eps)
    normed = normed * load_row(weight, head * N, cols, cols < N)[None, :]
    normed += load_row(bias, head * N, cols, cols < N)[None, :]
    g = load_tile(gate, offsets, mask)
    if r is not None:
        match = load_tile(r, offsets, mask) * load_tile(k, offsets, mask)
        match = tl.sum(match * load_row(r_k, head * N, cols, cols < N)[None, :], axis=1)
        normed += match[:, None] * load_tile(v, offsets, mask)
    else:
        g *= tl.sigmoid(g)
    store_tile(out, offsets, mask, normed * g)


@triton.jit(do_not_specialize=["tokens", "tiles", "each"])
def _backward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    read, r, k, v, gate, weight, bias, r_k, grad_out,  # noqa: ANN001
    grad_read, grad_gate, grad_r, grad_k, grad_v, partial, tokens, tiles, each, C, N, eps,  # noqa: ANN001
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    head = tl.program_id(1)
    cols = tl.arange(0, COLS)
    gamma = load_row(weight, head * N, cols, cols < N)[None, :]
    beta = load_row(bias, head * N, cols, cols < N)[None, :]
    sum_gamma = tl.zeros([COLS], tl.float32)
    sum_beta, sum_match = sum_gamma, sum_gamma
    start = tl.program_id(0) * each
    for tile in range(start, tl.minimum(start + each, tiles)):
        offsets, mask = head_tile(tile, head, tokens, C, N, ROWS, COLS)
        given = load_tile(grad_out, offsets, mask)
        g = load_tile(gate, offsets, mask)
        normed, scale = _normalised(read, offsets, mask, N, eps)
        ungated = normed * gamma + beta
        if r is not None:
            of_sum = given * g
            scales = load_row(r_k, head * N, cols, cols < N)[None, :]
            r_tile = load_tile(r, offsets, mask)
            k_tile = load_tile(k, offsets, mask)
            v_tile = load_tile(v, offsets, mask)
            match = tl.sum(r_tile * k_tile * scales, axis=1)[:, None]
            of_match = tl.sum(of_sum * v_tile, axis=1)[:, None]
            store_tile(grad_gate, offsets, mask, given * (ungated + match * v_tile))
            store_tile(grad_v, offsets, mask, of_sum * match)
            store_tile(grad_r, offsets, mask, of_match * k_tile * scales)
            store_tile(grad_k, offsets, mask, of_match * r_tile * scales)
            if partial is not None:
                sum_match += tl.sum(of_match * r_tile * k_tile, axis=0)
        else:
            opened = tl.sigmoid(g)
            of_sum = given * g * opened
            store_tile(grad_gate, offsets, mask, given * ungated * opened * (1.0 + g * (1.0 - opened)))
        if partial is not None:
            sum_gamma += tl.sum(of_sum * normed, axis=0)
            sum_beta += tl.sum(of_sum, axis=0)
        of_sum *= gamma
        along = tl.sum(of_sum * normed, axis=1) / N
        of_sum = of_sum - (tl.sum(of_sum, axis=1) / N)[:, None] - normed * along[:, None]
        store_tile(grad_read, offsets, mask, of_sum * scale[:, None])
    if partial is not None:
        place = tl.program_id(0).to(tl.int64) * 3 * C + head * N
        store_row(partial, place, cols, cols < N, sum_gamma)
        store_row(partial, place + C, cols, cols < N, sum_beta)
        store_row(partial, place + 2 * C, cols, cols < N, sum_match)


@torch.library.custom_op(
    "rwkvpeft::block_head_norm_forward",
    mutates_args=(),
    schema="(Tensor read, Tensor gate, Tensor weight, Tensor bias, Tensor[] bonus, float eps) -> Tensor",
)
@apart
def head_norm_forward(
    read: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, bonus: list[Tensor], eps: float
) -> Tensor:
    """Launch the forward kernel; all tensors contiguous, T > 0.

    Args:
        bonus: r, k, v and r_k (v7), or nothing (v5, v6).
    """
    batch, tokens, heads, size = read.shape
    out = torch.empty_like(gate)
    r, k, v, r_k = bonus or (None,) * 4
    tiles = HeadTiles.cut(batch * tokens, heads, size)
    _forward_kernel[(tiles.programs, heads)](
        read, r, k, v, gate, weight, bias, r_k, out, batch * tokens, heads * size, size, eps,
        ROWS=tiles.rows, COLS=tiles.cols, num_warps=4,
    )
    return out


@head_norm_forward.register_fake
def _(read: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, bonus: list[Tensor], eps: float) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op(
    "rwkvpeft::block_head_norm_backward",
    mutates_args=(),
    schema="(Tensor read, Tensor gate, Tensor weight, Tensor bias, Tensor[] bonus, Tensor grad, float eps,"
    " bool trained) -> Tensor[]",
)
@apart
def head_norm_backward(
    read: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    bonus: list[Tensor],
    grad: Tensor,
    eps: float,
    trained: bool,
) -> list[Tensor]:
    """Launch the backward kernel; all tensors contiguous, T > 0.

    Returns: gradients of read and gate; with a bonus of r, k and v; with trained parameters fp32 (3, C): of the norm's
        weight and bias and of r_k.
    """
    batch, tokens, heads, size = read.shape
    results = _empty_backward(read, gate, bonus, trained=False)
    r, k, v, r_k = bonus or (None,) * 4
    tiles = HeadTiles.cut(batch * tokens, heads, size, trained=trained)
    partial = read.new_empty(tiles.programs, 3, heads * size, dtype=torch.float32) if trained else None
    _backward_kernel[(tiles.programs, heads)](
        read, r, k, v, gate, weight, bias, r_k, grad, *results[:2], *(results[2:] or (None,) * 3), partial,
        batch * tokens, triton.cdiv(batch * tokens, tiles.rows), tiles.each, heads * size, size, eps,
        ROWS=tiles.rows, COLS=tiles.cols, num_warps=4,
    )
    return results if partial is None else [*results, partial.sum(0)]


@head_norm_backward.register_fake
def _(
    read: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    bonus: list[Tensor],
    grad: Tensor,
    eps: float,
    trained: bool,
) -> list[Tensor]:
    return _empty_backward(read, gate, bonus, trained=trained)


def _empty_backward(read: Tensor, gate: Tensor, bonus: list[Tensor], *, trained: bool) -> list[Tensor]:
    results = [torch.empty_like(tensor) for tensor in (read, gate, *bonus[:3])]
    return [*results, read.new_empty(3, gate.shape[2], dtype=torch.float32)] if trained else results


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eps: float, read: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *bonus: Tensor
    ) -> Tensor:
        ctx.save_for_backward(read, gate, weight, bias, *bonus)
        ctx.eps = eps
        return head_norm_forward(read, gate, weight, bias, list(bonus), eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, gate, weight, bias, *bonus = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # r_k is the last of the bonus
        trained = wanted[3] or wanted[4] or any(wanted[8:])
        results = head_norm_backward(read, gate, weight, bias, bonus, grad.contiguous(), ctx.eps, trained)
        grads = [None, *results[:2], None, None, *results[2 : 2 + len(bonus[:3])], *[None] * len(bonus[3:])]
        if trained:
            places = {3: weight, 4: bias} | ({8: bonus[3]} if bonus else {})
            for (place, parameter), row in zip(places.items(), results[-1], strict=False):
                grads[place] = row.view(parameter.shape).to(parameter.dtype)
        return tuple(result if needed else None for result, needed in zip(grads, wanted, strict=True))


def norm_bonus_gate(
    read: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, norm: Norm, r_k: Tensor
) -> Tensor:
    """See ``contract.NormBonusGate``."""
    if gate.numel() == 0:
        return plain.norm_bonus_gate(read, r, k, v, gate, norm, r_k)
    whole = (tensor.contiguous() for tensor in (r, k, v))
    result: Tensor = _HeadNorm.apply(
        norm.eps, read.contiguous(), gate.contiguous(), norm.weight, norm.bias, *whole, r_k
    )
    return result


def norm_gate(read: Tensor, gate: Tensor, norm: Norm) -> Tensor:
    """See ``contract.NormGate``."""
    if gate.numel() == 0:
        return plain.norm_gate(read, gate, norm)
    result: Tensor = _HeadNorm.apply(norm.eps, read.contiguous(), gate.contiguous(), norm.weight, norm.bias)
    return result
