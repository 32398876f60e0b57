"""WKV7 backward in three passes, as ``triton_forward`` (formulas: ``triton_kernel``).

    1. chunk by chunk    E and D = dYᵀ Q, from operands computed anew
    2. scan backwards    G_(n-1) = (G_n + G_n Eᵀ + D) with the chunk's decays; every G_n is kept
    3. chunk by chunk    dv, U and dX; then the gradients of all that bears a decay
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvpeft.ops.triton_tools import dot, load_block, load_tokens, place_of_chunk, store_block, store_tokens
from rwkvpeft.ops.wkv7.triton_forward import Operands, Plan, launch_scan
from rwkvpeft.ops.wkv7.triton_parts import STRONGEST, chunk_decays, seen


@triton.jit(do_not_specialize=["tokens", "per_row", "heads"])
def chunk_gradient_maps(  # type: ignore[no-untyped-def]  # noqa: ANN201
    R, A, B, M, dy, table, E, D, tokens, per_row, heads,  # noqa: ANN001
    L: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):
    """What one chunk of one head does to any gradient of its state: grid (chunks, H)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, count = place_of_chunk(table, chunk, tokens, per_row, L, PACKED)
    block = chunk.to(tl.int64) * heads + head
    W = dot(load_block(M, block, L, L), load_block(A, block, L, N), MODE)
    store_block(E, dot(tl.trans(W), load_block(B, block, L, N), MODE), block, N, N)
    receptance = load_block(R, block, L, N)
    A_rb = seen(dot(receptance, tl.trans(load_block(B, block, L, N)), MODE), L, False)
    queries = receptance.to(tl.float32) + dot(A_rb, W, MODE)
    given = load_tokens(dy, first, count, head, heads, L, N)
    store_block(D, dot(tl.trans(given), queries, MODE), block, N, N)


@triton.jit(do_not_specialize=["tokens", "per_row", "heads"])
def chunk_value_gradients(  # type: ignore[no-untyped-def]  # noqa: ANN201
    R, A, K, B, M, v, dy, S, G, table, U, dX, dv, tokens, per_row, heads,  # noqa: ANN001
    L: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):
    """U, and in another program dX and dv, of one chunk of one head: grid (chunks, H, 2)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, count = place_of_chunk(table, chunk, tokens, per_row, L, PACKED)
    block = chunk.to(tl.int64) * heads + head
    removal = load_block(A, block, L, N)
    key = load_block(K, block, L, N)
    A_ak = seen(dot(removal, tl.trans(key), MODE), L, True)
    solved = load_block(M, block, L, L)
    if tl.program_id(2) == 0:
        value = load_tokens(v, first, count, head, heads, L, N).to(key.dtype)
        X = dot(A_ak, value, MODE) + dot(removal, tl.trans(load_block(S, block, N, N)), MODE)
        store_block(U, dot(solved, X, MODE), block, L, N)
    else:
        given = load_tokens(dy, first, count, head, heads, L, N).to(key.dtype)
        grown = load_block(G, block, N, N)
        receptance = load_block(R, block, L, N)
        write = load_block(B, block, L, N)
        A_rb = seen(dot(receptance, tl.trans(write), MODE), L, False)
        dU = dot(tl.trans(A_rb), given, MODE) + dot(write, tl.trans(grown), MODE)
        solved_back = dot(tl.trans(solved), dU, MODE).to(key.dtype)
        store_block(dX, solved_back, block, L, N)
        key = load_block(K, block, L, N)
        out = dot(tl.trans(A_ak), solved_back, MODE) + dot(key, tl.trans(load_block(G, block, N, N)), MODE)
        A_rk = seen(dot(load_block(R, block, L, N), tl.trans(key), MODE), L, False)
        given = load_tokens(dy, first, count, head, heads, L, N).to(key.dtype)
        store_tokens(dv, out + dot(tl.trans(A_rk), given, MODE), first, count, head, heads, L, N)


@triton.jit(do_not_specialize=["tokens", "per_row", "heads"])
def chunk_key_gradients(  # type: ignore[no-untyped-def]  # noqa: ANN201
    R, A, K, B, w, v, dy, S, G, U, dX, table, dr, dw, dk, da, db, tokens, per_row, heads,  # noqa: ANN001
    L: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):
    """dr, dw, dk, da and db of one chunk of one head: grid (chunks, H).

    The gradient of a log decay is a sum in which nearly all terms cancel between what a row and what a column of a
    product is owed, if both are taken times the very operands that the product saw.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, count = place_of_chunk(table, chunk, tokens, per_row, L, PACKED)
    block = chunk.to(tl.int64) * heads + head
    c, e, middle, total = chunk_decays(w, first, count, head, heads, L, N)

    given = load_tokens(dy, first, count, head, heads, L, N)
    value = load_tokens(v, first, count, head, heads, L, N)
    solved = load_block(U, block, L, N)
    back = load_block(dX, block, L, N)
    d_rk = seen(dot(given, tl.trans(value), MODE), L, False)
    d_rb = seen(dot(given, tl.trans(solved), MODE), L, False)
    d_ak = seen(dot(back, tl.trans(value), MODE), L, True)
    d_ab = seen(dot(back, tl.trans(solved), MODE), L, True)
    receptance = load_block(R, block, L, N)
    removal = load_block(A, block, L, N)
    key = load_block(K, block, L, N)
    write = load_block(B, block, L, N)
    S_start = load_block(S, block, N, N)
    G_end = load_block(G, block, N, N)

    owed = dot(d_rk, key, MODE) + dot(d_rb, write, MODE) + dot(given, S_start, MODE)
    store_tokens(dr, owed * tl.exp(c - middle), first, count, head, heads, L, N)
    through = receptance * owed
    owed = dot(d_ak, key, MODE) + dot(d_ab, write, MODE) + dot(back, S_start, MODE)
    store_tokens(da, owed * tl.exp(e - middle), first, count, head, heads, L, N)
    through_a = removal * owed
    inside = dot(tl.trans(d_rk), receptance, MODE) + dot(tl.trans(d_ak), removal, MODE)
    leaving = dot(value, G_end, MODE)
    store_tokens(dk, (inside + leaving) * tl.exp(middle - c), first, count, head, heads, L, N)
    through -= key * inside
    before = key * leaving
    inside = dot(tl.trans(d_rb), receptance, MODE) + dot(tl.trans(d_ab), removal, MODE)
    leaving = dot(solved, G_end, MODE)
    store_tokens(db, (inside + leaving) * tl.exp(middle - c), first, count, head, heads, L, N)
    through -= write * inside
    before += write * leaving

    across = tl.sum(S_start.to(tl.float32) * G_end.to(tl.float32), 0)[None, :]
    later = tl.cumsum(through + through_a, 0, reverse=True) - through_a
    d_ell = across + later + tl.cumsum(before, 0) - before
    # sigmoid(x) sigmoid(-x), without 1 - sigmoid(x), which loses every digit for a large x
    small = tl.exp(-tl.abs(load_tokens(w, first, count, head, heads, L, N)))
    slope = STRONGEST * small / ((1.0 + small) * (1.0 + small))
    store_tokens(dw, d_ell * slope, first, count, head, heads, L, N)


def backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, states: Tensor, dy: Tensor,
    dfinal: Tensor | None, table: Tensor | None, first: Tensor | None, *, operands: bool,
) -> tuple[list[Tensor], Tensor]:
    """Differentiate ``triton_forward.forward``; contiguous tensors.

    Args:
        states: those the forward returned third.
        dy, dfinal: of y and of the final states, None for zeros.
        operands: whether the gradients of r, w, k, v, a and b are wanted.
    Returns: these six, or none; and the gradient of the states before the first token, in fp32.
    """
    plan = Plan.of(v, table, first)
    length, size = plan.length, plan.size
    grads = [torch.empty_like(x) for x in (r, w, k, v, a, b)] if operands else []
    if not v.numel():
        dstate = v.new_zeros(plan.sequences, plan.heads, size, size, dtype=torch.float32)
        return grads, dstate if dfinal is None else dstate.copy_(dfinal)
    given = Operands.of(plan, r, w, k, a, b, table)
    across = plan.blocks(v, size, size, dtype=plan.narrow)
    added = plan.blocks(v, size, size)
    chunk_gradient_maps[plan.grid](
        given.R, given.A, given.B, given.M, dy, table, across, added, *plan.places,
        **plan.shape, num_warps=8 if size > 64 else 4, num_stages=1,
    )
    ends, dstate = launch_scan(plan, across, added, given.end, given.start, first, dfinal, reverse=True)
    if not operands:
        return grads, dstate
    del across, added
    dr, dw, dk, dv, da, db = grads
    solved = plan.blocks(v, length, size, dtype=plan.narrow)
    back = torch.empty_like(solved)
    chunk_value_gradients[(*plan.grid, 2)](
        given.R, given.A, given.K, given.B, given.M, v, dy, states, ends, table, solved, back, dv, *plan.places,
        **plan.shape, num_warps=4, num_stages=1,
    )
    chunk_key_gradients[plan.grid](
        given.R, given.A, given.K, given.B, w, v, dy, states, ends, solved, back, table, dr, dw, dk, da, db,
        *plan.places, **plan.shape, num_warps=4, num_stages=1,
    )
    return grads, dstate
