"""What a block's kernels share: how they cut their work, and how they load."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

MOST_ROWS = 65535
"""A CUDA launch's second axis, on which sequences lie."""


def tokens_each(batch: int, tokens: int, *, programs: int) -> int:
    """Neighbouring tokens of a sequence one program takes, so that there are about so many programs; at most 32."""
    return max(1, min(32, tokens, -(-batch * tokens // programs)))


@triton.jit
def load_row(pointer, offset, cols, inside):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Entries ``cols`` behind ``offset`` in fp32, 0 where not ``inside``."""
    return tl.load(pointer + offset + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_optional_row(pointer, offset, cols, inside):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """``load_row``, or zeros if the pointer is None."""
    if pointer is None:
        row = cols.to(tl.float32) * 0.0
    else:
        row = tl.load(pointer + offset + cols, mask=inside, other=0.0).to(tl.float32)
    return row


@triton.jit
def load_numbered_row(pointer, number, C, cols):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """That row of a (rows, C) matrix in fp32; zeros if the number is negative or the pointer None."""
    there = cols < tl.where(number >= 0, C, 0)
    return load_optional_row(pointer, tl.maximum(number, 0).to(tl.int64) * C, cols, there)


@triton.jit
def store_row(pointer, offset, cols, inside, row):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Write ``row`` where ``inside``, rounded to what the pointer points at."""
    tl.store(pointer + offset + cols, row.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def store_numbered_row(pointer, number, C, cols, row):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Write that row of a (rows, C) matrix, unless its number is negative."""
    there = cols < tl.where(number >= 0, C, 0)
    store_row(pointer, tl.maximum(number, 0).to(tl.int64) * C, cols, there, row)


@triton.jit
def load_tile(pointer, offsets, mask):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Entries at ``offsets`` in fp32, 0 where masked."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, offsets, mask, tile):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Write ``tile`` where the mask is set, rounded to what the pointer points at."""
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def head_tile(tile, head, tokens, C, N, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Offsets and mask of the ``tile``-th ROWS tokens of one head in a (tokens, C) matrix, both (ROWS, COLS)."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    offsets = rows.to(tl.int64)[:, None] * C + (head * N + cols)[None, :]
    return offsets, (rows < tokens)[:, None] & (cols < N)[None, :]


class HeadTiles(NamedTuple):
    """How (tokens, C) is cut into tiles of some tokens of one head.

    ``rows`` tokens and ``cols`` >= N channels a tile, ``each`` tiles a program, ``programs`` a head.
    """

    rows: int
    cols: int
    each: int
    programs: int

    @staticmethod
    def cut(tokens: int, heads: int, size: int, *, trained: bool = False) -> HeadTiles:
        """Small tiles, and one a program; but few programs if each leaves sums over its tokens behind."""
        cols = triton.next_power_of_2(size)
        rows = max(1, 2048 // cols)
        tiles = triton.cdiv(tokens, rows)
        each = triton.cdiv(tiles * heads, 1024) if trained else 1
        return HeadTiles(rows, cols, each, triton.cdiv(tiles, each))
