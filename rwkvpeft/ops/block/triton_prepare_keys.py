"""v7's value, keys, removal key and learning rate in one kernel, their gradients in another.

Letters: B batch, T tokens, C channels, H heads, N head size. A program works on some tokens of one head. Nothing but
the inputs is kept for the backward pass. Sums over tokens for parameters are made within each program, then over
programs: in the same order in every run.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.block import plain
from rwkvpeft.ops.block.contract import KeyParameters, PreparedKeys
from rwkvpeft.ops.block.triton_tiles import HeadTiles, head_tile, load_row, load_tile, store_row, store_tile
from rwkvpeft.ops.opaque import apart

# what F.normalize adds to no length, but takes for a shorter one
_SHORTEST = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    key, value, rate_logit, first_value, share_logit, a0, k_k, k_a, v0,  # noqa: ANN001
    new_key, remove, write, new_value, tokens, C, N, ROWS: tl.constexpr, COLS: tl.constexpr,  # noqa: ANN001
):
    head = tl.program_id(1)
    cols = tl.arange(0, COLS)
    offsets, mask = head_tile(tl.program_id(0), head, tokens, C, N, ROWS, COLS)
    k = load_tile(key, offsets, mask)
    rate = tl.sigmoid(load_tile(rate_logit, offsets, mask) + load_row(a0, head * N, cols, cols < N)[None, :])
    removal = k * load_row(k_k, head * N, cols, cols < N)[None, :]
    length = tl.sqrt(tl.sum(removal * removal, axis=1))
    removal = removal / tl.maximum(length, _SHORTEST)[:, None]
    store_tile(remove, offsets, mask, -removal)
    store_tile(write, offsets, mask, removal * rate)
    store_tile(new_key, offsets, mask, k * (1.0 + (rate - 1.0) * load_row(k_a, head * N, cols, cols < N)[None, :]))
    if first_value is not None:
        v = load_tile(value, offsets, mask)
        share = tl.sigmoid(load_tile(share_logit, offsets, mask) + load_row(v0, head * N, cols, cols < N)[None, :])
        store_tile(new_value, offsets, mask, v + (load_tile(first_value, offsets, mask) - v) * share)


@triton.jit(do_not_specialize=["tokens", "tiles", "each"])
def _backward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    key, value, rate_logit, first_value, share_logit, a0, k_k, k_a, v0,  # noqa: ANN001
    grad_new_key, grad_remove, grad_write, grad_new_value,  # noqa: ANN001
    grad_key, grad_rate, grad_value, grad_first, grad_share, partial,  # noqa: ANN001
    tokens, tiles, each, C, N, ROWS: tl.constexpr, COLS: tl.constexpr,  # noqa: ANN001
):
    head = tl.program_id(1)
    cols = tl.arange(0, COLS)
    rate_bias = load_row(a0, head * N, cols, cols < N)[None, :]
    removal_scale = load_row(k_k, head * N, cols, cols < N)[None, :]
    update_scale = load_row(k_a, head * N, cols, cols < N)[None, :]
    sum_rate = tl.zeros([COLS], tl.float32)
    sum_removal, sum_update, sum_share = sum_rate, sum_rate, sum_rate
    start = tl.program_id(0) * each
    for tile in range(start, tl.minimum(start + each, tiles)):
        offsets, mask = head_tile(tile, head, tokens, C, N, ROWS, COLS)
        k = load_tile(key, offsets, mask)
        rate = tl.sigmoid(load_tile(rate_logit, offsets, mask) + rate_bias)
        removal = k * removal_scale
        length = tl.sqrt(tl.sum(removal * removal, axis=1))
        divisor = tl.maximum(length, _SHORTEST)
        removal = removal / divisor[:, None]
        of_write = load_tile(grad_write, offsets, mask)
        of_key = load_tile(grad_new_key, offsets, mask)
        of_removal = of_write * rate - load_tile(grad_remove, offsets, mask)
        along = tl.where(length >= _SHORTEST, tl.sum(of_removal * removal, axis=1), 0.0)
        of_removal = (of_removal - removal * along[:, None]) / divisor[:, None]
        of_rate = (of_write * removal + of_key * k * update_scale) * rate * (1.0 - rate)
        store_tile(grad_rate, offsets, mask, of_rate)
        store_tile(
            grad_key, offsets, mask, of_key * (1.0 + (rate - 1.0) * update_scale) + of_removal * removal_scale
        )
        if partial is not None:
            sum_rate += tl.sum(of_rate, axis=0)
            sum_removal += tl.sum(of_removal * k, axis=0)
            sum_update += tl.sum(of_key * k * (rate - 1.0), axis=0)
        if first_value is not None:
            v = load_tile(value, offsets, mask)
            share_bias = load_row(v0, head * N, cols, cols < N)[None, :]
            share = tl.sigmoid(load_tile(share_logit, offsets, mask) + share_bias)
            of_value = load_tile(grad_new_value, offsets, mask)
            of_share = of_value * (load_tile(first_value, offsets, mask) - v) * share * (1.0 - share)
            store_tile(grad_value, offsets, mask, of_value * (1.0 - share))
            store_tile(grad_first, offsets, mask, of_value * share)
            store_tile(grad_share, offsets, mask, of_share)
            if partial is not None:
                sum_share += tl.sum(of_share, axis=0)
    if partial is not None:
        place = tl.program_id(0).to(tl.int64) * 4 * C + head * N
        store_row(partial, place, cols, cols < N, sum_rate)
        store_row(partial, place + C, cols, cols < N, sum_removal)
        store_row(partial, place + 2 * C, cols, cols < N, sum_update)
        store_row(partial, place + 3 * C, cols, cols < N, sum_share)


@torch.library.custom_op(
    "rwkvpeft::block_prepare_keys_forward",
    mutates_args=(),
    schema="(Tensor key, Tensor value, Tensor rate_logit, Tensor? first_value, Tensor? share_logit,"
    " Tensor[] parameters, int heads) -> Tensor[]",
)
@apart
def prepare_keys_forward(
    key: Tensor,
    value: Tensor,
    rate_logit: Tensor,
    first_value: Tensor | None,
    share_logit: Tensor | None,
    parameters: list[Tensor],
    heads: int,
) -> list[Tensor]:
    """Launch the forward kernel; all tensors contiguous, T > 0.

    Returns: (B, T, H, N) each: key, removal key with its sign, what is written, and with a first value the value.
    """
    channels = key.shape[2]
    tokens, size = key.numel() // channels, channels // heads
    results = _empty_forward(key, first_value, heads)
    tiles = HeadTiles.cut(tokens, heads, size)
    _forward_kernel[(tiles.programs, heads)](
        key, value, rate_logit, first_value, share_logit, *parameters, *results[:3],
        results[3] if first_value is not None else None, tokens, channels, size, ROWS=tiles.rows, COLS=tiles.cols,
        num_warps=4,
    )
    return results


def _empty_forward(key: Tensor, first_value: Tensor | None, heads: int) -> list[Tensor]:
    shape = (*key.shape[:2], heads, key.shape[2] // heads)
    return [key.new_empty(shape) for _ in range(3 if first_value is None else 4)]


@prepare_keys_forward.register_fake
def _(
    key: Tensor,
    value: Tensor,
    rate_logit: Tensor,
    first_value: Tensor | None,
    share_logit: Tensor | None,
    parameters: list[Tensor],
    heads: int,
) -> list[Tensor]:
    return _empty_forward(key, first_value, heads)


@torch.library.custom_op(
    "rwkvpeft::block_prepare_keys_backward",
    mutates_args=(),
    schema="(Tensor key, Tensor value, Tensor rate_logit, Tensor? first_value, Tensor? share_logit,"
    " Tensor[] parameters, Tensor[] grads, int heads, bool trained) -> Tensor[]",
)
@apart
def prepare_keys_backward(
    key: Tensor,
    value: Tensor,
    rate_logit: Tensor,
    first_value: Tensor | None,
    share_logit: Tensor | None,
    parameters: list[Tensor],
    grads: list[Tensor],
    heads: int,
    trained: bool,
) -> list[Tensor]:
    """Launch the backward kernel; all tensors contiguous, T > 0; ``grads`` in the order of the forward results.

    Returns: gradients of key and rate_logit; with a first value of value, first_value and share_logit; with trained
        parameters fp32 (4, C): of a0, k_k, k_a and v0.
    """
    channels = key.shape[2]
    tokens, size = key.numel() // channels, channels // heads
    results = _empty_backward(key, first_value, trained=False)
    tiles = HeadTiles.cut(tokens, heads, size, trained=trained)
    partial = key.new_empty(tiles.programs, 4, channels, dtype=torch.float32) if trained else None
    values = results[2:] if first_value is not None else [None, None, None]
    _backward_kernel[(tiles.programs, heads)](
        key, value, rate_logit, first_value, share_logit, *parameters, *grads[:3],
        grads[3] if first_value is not None else None, *results[:2], *values, partial,
        tokens, triton.cdiv(tokens, tiles.rows), tiles.each, channels, size, ROWS=tiles.rows, COLS=tiles.cols,
        num_warps=4,
    )
    return results if partial is None else [*results, partial.sum(0)]


def _empty_backward(key: Tensor, first_value: Tensor | None, *, trained: bool) -> list[Tensor]:
    results = [torch.empty_like(key) for _ in range(2 if first_value is None else 5)]
    return [*results, key.new_empty(4, key.shape[2], dtype=torch.float32)] if trained else results


@prepare_keys_backward.register_fake
def _(
    key: Tensor,
    value: Tensor,
    rate_logit: Tensor,
    first_value: Tensor | None,
    share_logit: Tensor | None,
    parameters: list[Tensor],
    grads: list[Tensor],
    heads: int,
    trained: bool,
) -> list[Tensor]:
    return _empty_backward(key, first_value, trained=trained)


class _PrepareKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: int,
        key: Tensor,
        value: Tensor,
        rate_logit: Tensor,
        first_value: Tensor | None,
        share_logit: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (key, value, rate_logit, first_value, share_logit)
        # layer 0 keeps its value as it is: nothing of it is needed again
        ctx.save_for_backward(key, None if first_value is None else value, *inputs[2:], *parameters)
        ctx.heads = heads
        ctx.set_materialize_grads(False)
        return tuple(prepare_keys_forward(*inputs, list(parameters), heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        key, value, rate_logit, first_value, share_logit, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        given = [torch.zeros_like(key) if grad is None else grad.contiguous() for grad in grads]
        grad_key, grad_rate, *rest = prepare_keys_backward(
            key, key if value is None else value, rate_logit, first_value, share_logit, parameters, given, ctx.heads,
            any(wanted[6:]),
        )
        grad_value, grad_first, grad_share = rest[:3] if first_value is not None else (None, None, None)
        results = [None, grad_key, grad_value, grad_rate, grad_first, grad_share]
        if any(wanted[6:]):
            sums = [row.view(p.shape).to(p.dtype) for row, p in zip(rest[-1], parameters, strict=True)]
            results += [*sums[:3], sums[3] if first_value is not None else None]
        return tuple(grad if needed else None for grad, needed in zip_longest(results, wanted))


def prepare_keys(
    key: Tensor,
    value: Tensor,
    rate_logit: Tensor,
    first_value: Tensor | None,
    share_logit: Tensor | None,
    parameters: KeyParameters,
    heads: int,
) -> PreparedKeys:
    """See ``contract.PrepareKeys``."""
    inputs = (key, value, rate_logit, first_value, share_logit)
    if key.numel() == 0:
        return plain.prepare_keys(*inputs, parameters, heads)
    whole = (None if tensor is None else tensor.contiguous() for tensor in inputs)
    new_key, remove, write, *moved = _PrepareKeys.apply(heads, *whole, *parameters)
    return PreparedKeys(new_key, moved[0] if moved else value.unflatten(-1, (heads, -1)), remove, write)
