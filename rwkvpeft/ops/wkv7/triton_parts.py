"""What the chunked WKV7 kernels share: decays of a chunk and the inverse of its triangle.

Letters of the kernels, for a chunk of L tokens and a head of N channels: ell_t log decay, c_t its sum up to and
including token t, e_t = c_t - ell_t, "middle" c at half the chunk, "total" c at its end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rwkvpeft.ops.triton_tools import dot, load_tokens

STRONGEST = tl.constexpr(-0.6065306597126334)
"""-e^-0.5, the log decay of a saturated logit."""


@triton.jit
def chunk_decays(w, first, count, head, heads, L: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """From raw decay logits: c and e, (L, N), and middle and total, (N,). Tokens behind the last do not decay.

    A factor e^(c_t - c_s) is split at ``middle``. For L = 64 that bounds both its parts by e^(0.6065 · 33) = 5e8,
    which fp32 and bf16 hold; the rounding of an operand is relative, so that its size costs no precision.
    """
    token = tl.arange(0, L)[:, None]
    ell = STRONGEST / (1.0 + tl.exp(-load_tokens(w, first, count, head, heads, L, N)))
    ell = tl.where(token < count, ell, 0.0)
    c = tl.cumsum(ell, 0)
    middle = tl.sum(tl.where(token < L // 2, ell, 0.0), 0)
    return c, c - ell, middle, tl.sum(ell, 0)


@triton.jit
def seen(x, L: tl.constexpr, STRICT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Keep where row t sees column s, s <= t, or s < t if ``STRICT``; by selection, as the rest may be infinite."""
    row = tl.arange(0, L)[:, None]
    column = tl.arange(0, L)[None, :]
    if STRICT:
        kept = column < row
    else:
        kept = column <= row
    return tl.where(kept, x, 0.0)


@triton.jit
def seeing(x, L: tl.constexpr, STRICT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """``seen`` of a transposed matrix: rows s, columns t."""
    row = tl.arange(0, L)[:, None]
    column = tl.arange(0, L)[None, :]
    if STRICT:
        kept = row < column
    else:
        kept = row <= column
    return tl.where(kept, x, 0.0)


@triton.jit
def doubled(M, A, row, column, b: tl.constexpr, MODE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """From the inverses of the diagonal blocks of b rows those of 2b: M + M Off M, Off their lower left quarters."""
    off = tl.where((row // (2 * b) == column // (2 * b)) & (row // b > column // b), A, 0.0)
    return M + dot(M, dot(off, M, MODE), MODE)


@triton.jit
def inverse(A, L: tl.constexpr, FINE: tl.constexpr, COARSE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """(I - A)^-1 of a strictly lower (L, L) matrix, by doubling the size of the blocks inverted.

    The Neumann product, as short, would lose all digits where keys repeat.

    Args:
        FINE: how products round inside tiles of 16 tokens.
        COARSE: how they round between tiles.
    """
    tiles: tl.constexpr = L // 16
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    own = tl.arange(0, tiles)[:, None, None, None] == tl.arange(0, tiles)[None, None, :, None]
    tile = tl.sum(tl.where(own, tl.reshape(A, (tiles, 16, tiles, 16)), 0.0), 2)
    M = tl.where(row == column, 1.0, tl.where((row // 2 == column // 2) & (column < row), tile, 0.0))
    M = doubled(M, tile, row, column, 2, FINE)
    M = doubled(M, tile, row, column, 4, FINE)
    M = doubled(M, tile, row, column, 8, FINE)
    M = tl.reshape(tl.where(own, M[:, :, None, :], 0.0), (L, L))
    row = tl.arange(0, L)[:, None]
    column = tl.arange(0, L)[None, :]
    if L >= 32:
        M = doubled(M, A, row, column, 16, COARSE)
    if L >= 64:
        M = doubled(M, A, row, column, 32, COARSE)
    return M
