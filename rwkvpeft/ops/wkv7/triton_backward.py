"""WKV7 backward in three passes, as ``triton_forward`` (formulas: ``triton_kernel``).

    1. chunk by chunk    E and D = dYᵀ Q, from operands computed anew
    2. scan backwards    G_(n-1) = (G_n + G_n Eᵀ + D) with the chunk's decays; every G_n is kept
    3. chunk by chunk    U and dX; from these the gradients of all operands; and of the decays, from their parts
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvpeft.ops.triton_tools import (
    capability,
    dot,
    load_block,
    load_tokens,
    place_of_chunk,
    store_block,
    store_tokens,
    store_transposed,
)
from rwkvpeft.ops.wkv7.triton_forward import Operands, Plan, launch_scan
from rwkvpeft.ops.wkv7.triton_parts import STRONGEST, chunk_decays, seeing, seen


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
    store_transposed(E, dot(tl.trans(load_block(B, block, L, N)), W, MODE), block, N, N)
    receptance = load_block(R, block, L, N)
    A_rb = seen(dot(receptance, tl.trans(load_block(B, block, L, N)), MODE), L, False)
    queries = receptance.to(tl.float32) + dot(A_rb, W, MODE)
    given = load_tokens(dy, first, count, head, heads, L, N)
    store_block(D, dot(tl.trans(given), queries, MODE), block, N, N)


@triton.jit(do_not_specialize=["tokens", "per_row", "heads"])
def chunk_solutions(  # type: ignore[no-untyped-def]  # noqa: ANN201
    R, A, K, B, M, v, dy, S, G, table, U, dX, tokens, per_row, heads,  # noqa: ANN001
    L: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):
    """U or dX of one chunk of one head: grid (chunks, H, 2)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, count = place_of_chunk(table, chunk, tokens, per_row, L, PACKED)
    block = chunk.to(tl.int64) * heads + head
    if tl.program_id(2) == 0:
        removal = load_block(A, block, L, N)
        value = load_tokens(v, first, count, head, heads, L, N).to(A.dtype.element_ty)
        X = dot(seen(dot(removal, tl.trans(load_block(K, block, L, N)), MODE), L, True), value, MODE)
        X += dot(removal, tl.trans(load_block(S, block, N, N)), MODE)
        store_block(U, dot(load_block(M, block, L, L), X, MODE), block, L, N)
    else:
        write = load_block(B, block, L, N)
        given = load_tokens(dy, first, count, head, heads, L, N).to(A.dtype.element_ty)
        dU = dot(seeing(dot(write, tl.trans(load_block(R, block, L, N)), MODE), L, False), given, MODE)
        dU += dot(write, tl.trans(load_block(G, block, N, N)), MODE)
        store_block(dX, dot(tl.trans(load_block(M, block, L, L)), dU, MODE), block, L, N)


@triton.jit(do_not_specialize=["tokens", "per_row", "heads"])
def chunk_gradients(  # type: ignore[no-untyped-def]  # noqa: ANN201
    R, A, K, B, w, v, dy, S, G, U, dX, table, dr, dk, dv, da, db, d_ell, tokens, per_row, heads,  # noqa: ANN001
    L: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):
    """One of dk, db, dr, da and dv, of one chunk of one head: grid (chunks, H, 5).

    All but the last write what they owe to the gradients of the log decays, too. Nearly all of that cancels, if what
    rows and what columns of a product are owed is taken times the very operands that the product saw.
    """
    chunk, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count = place_of_chunk(table, chunk, tokens, per_row, L, PACKED)
    block = chunk.to(tl.int64) * heads + head
    if part < 2:
        if part == 0:
            source = load_tokens(v, first, count, head, heads, L, N).to(K.dtype.element_ty)
        else:
            source = load_block(U, block, L, N)
        given = load_tokens(dy, first, count, head, heads, L, N).to(K.dtype.element_ty)
        inside = dot(seeing(dot(source, tl.trans(given), MODE), L, False), load_block(R, block, L, N), MODE)
        back = load_block(dX, block, L, N)
        inside += dot(seeing(dot(source, tl.trans(back), MODE), L, True), load_block(A, block, L, N), MODE)
        leaving = dot(source, load_block(G, block, N, N), MODE)
        c, _, middle, _ = chunk_decays(w, first, count, head, heads, L, N)
        owed = (inside + leaving) * tl.exp(middle - c)
        if part == 0:
            store_tokens(dk, owed, first, count, head, heads, L, N)
            column = load_block(K, block, L, N)
        else:
            store_tokens(db, owed, first, count, head, heads, L, N)
            column = load_block(B, block, L, N)
        before = column * leaving
        through = tl.cumsum(before, 0) - before - tl.cumsum(column * inside, 0, reverse=True)
        store_block(d_ell, through, 4 * block + part, L, N)
    elif part == 2:
        given = load_tokens(dy, first, count, head, heads, L, N).to(K.dtype.element_ty)
        value = load_tokens(v, first, count, head, heads, L, N).to(K.dtype.element_ty)
        owed = dot(seen(dot(given, tl.trans(value), MODE), L, False), load_block(K, block, L, N), MODE)
        solved = load_block(U, block, L, N)
        owed += dot(seen(dot(given, tl.trans(solved), MODE), L, False), load_block(B, block, L, N), MODE)
        owed += dot(given, load_block(S, block, N, N), MODE)
        c, _, middle, _ = chunk_decays(w, first, count, head, heads, L, N)
        store_tokens(dr, owed * tl.exp(c - middle), first, count, head, heads, L, N)
        through = tl.cumsum(load_block(R, block, L, N) * owed, 0, reverse=True)
        store_block(d_ell, through, 4 * block + part, L, N)
    elif part == 3:
        back = load_block(dX, block, L, N)
        value = load_tokens(v, first, count, head, heads, L, N).to(K.dtype.element_ty)
        owed = dot(seen(dot(back, tl.trans(value), MODE), L, True), load_block(K, block, L, N), MODE)
        solved = load_block(U, block, L, N)
        owed += dot(seen(dot(back, tl.trans(solved), MODE), L, True), load_block(B, block, L, N), MODE)
        owed += dot(back, load_block(S, block, N, N), MODE)
        _, e, middle, _ = chunk_decays(w, first, count, head, heads, L, N)
        store_tokens(da, owed * tl.exp(e - middle), first, count, head, heads, L, N)
        row = load_block(A, block, L, N) * owed
        through = tl.cumsum(row, 0, reverse=True) - row
        store_block(d_ell, through, 4 * block + part, L, N)
    else:
        key = load_block(K, block, L, N)
        owed = dot(key, tl.trans(load_block(G, block, N, N)), MODE)
        sight = seeing(dot(key, tl.trans(load_block(R, block, L, N)), MODE), L, False)
        given = load_tokens(dy, first, count, head, heads, L, N).to(K.dtype.element_ty)
        owed += dot(sight, given, MODE)
        sight = seeing(dot(key, tl.trans(load_block(A, block, L, N)), MODE), L, True)
        owed += dot(sight, load_block(dX, block, L, N), MODE)
        store_tokens(dv, owed, first, count, head, heads, L, N)


@triton.jit(do_not_specialize=["tokens", "per_row", "heads"])
def chunk_decay_gradients(  # type: ignore[no-untyped-def]  # noqa: ANN201
    w, S, G, d_ell, table, dw, tokens, per_row, heads,  # noqa: ANN001
    L: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):
    """dw of one chunk of one head, from its parts: grid (chunks, H)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, count = place_of_chunk(table, chunk, tokens, per_row, L, PACKED)
    block = chunk.to(tl.int64) * heads + head
    across = tl.sum(load_block(S, block, N, N).to(tl.float32) * load_block(G, block, N, N).to(tl.float32), 0)
    owed = load_block(d_ell, 4 * block, L, N) + load_block(d_ell, 4 * block + 1, L, N)
    owed += load_block(d_ell, 4 * block + 2, L, N) + load_block(d_ell, 4 * block + 3, L, N)
    # sigmoid(x) sigmoid(-x), without 1 - sigmoid(x), which loses every digit for a large x
    small = tl.exp(-tl.abs(load_tokens(w, first, count, head, heads, L, N)))
    slope = STRONGEST * small / ((1.0 + small) * (1.0 + small))
    store_tokens(dw, (owed + across[None, :]) * slope, first, count, head, heads, L, N)


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
    chunk_gradient_maps[plan.grid(1)](
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
    warps = _warps(size)
    chunk_solutions[plan.grid(2)](
        given.R, given.A, given.K, given.B, given.M, v, dy, states, ends, table, solved, back, *plan.places,
        **plan.shape, num_warps=warps, num_stages=1,
    )
    d_ell = plan.blocks(v, 4, length, size)
    chunk_gradients[plan.grid(5)](
        given.R, given.A, given.K, given.B, w, v, dy, states, ends, solved, back, table, dr, dk, dv, da, db, d_ell,
        *plan.places, **plan.shape, num_warps=warps, num_stages=1,
    )
    chunk_decay_gradients[plan.grid(1)](
        w, states, ends, d_ell, table, dw, *plan.places, **plan.shape, num_warps=warps, num_stages=1
    )
    return grads, dstate


def _warps(size: int) -> int:
    """Warps of a program; the data centre's Blackwell needs more registers for the same products."""
    return 8 if size > 64 or capability() // 10 == 10 else 4
