"""WKV7 forward in three passes, so that chunks of a sequence are computed side by side (formulas: ``triton_kernel``).

    1. chunk by chunk    decayed operands and M; from these Q, Y0, E and C, what the chunk does to any state
    2. scan              from every chunk's state the next one's, a few value rows of a head for each program
    3. chunk by chunk    y = Q S_nᵀ + Y0

Pass 3 could be done by the scan once B·H·N / 16 programs fill the GPU; it is not, for each of them would read all of Q,
and what is written between the passes is mostly still in the second-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvpeft.ops.triton_tools import (
    capability,
    chunks_of_sequence,
    dot,
    dot_mode,
    load_block,
    load_tokens,
    place_of_chunk,
    store_block,
    store_tokens,
    store_transposed,
)
from rwkvpeft.ops.wkv7.triton_parts import chunk_decays, inverse, seen

ROWS = 16
"""Value rows of a state that a program of the scan keeps: the fewest a product allows, for the most programs."""


@dataclass(frozen=True)
class Plan:
    """How one call is cut: sizes, products and work space, the same for forward and backward.

    Args:
        tokens, heads, size: T, H and N.
        sequences: rows of tokens, or packed sequences.
        chunks: in all of them.
        packed: whether chunks lie where a table says.
        mode: how products round operands, see ``dot_mode``.
    """

    tokens: int
    heads: int
    size: int
    sequences: int
    chunks: int
    packed: bool
    mode: str

    @classmethod
    def of(cls, value: Tensor, table: Tensor | None, first: Tensor | None) -> Plan:
        """The plan for a (B, T, H, N) tensor of values and the tables of packed sequences, if any."""
        batch, tokens, heads, size = value.shape
        if table is None or first is None:
            chunks = batch * -(-tokens // chunk_length(size, value.dtype))
            return cls(tokens, heads, size, batch, chunks, False, dot_mode(value.dtype))
        return cls(tokens, heads, size, len(first) - 1, len(table), True, dot_mode(value.dtype))

    @property
    def length(self) -> int:
        """L, tokens of a chunk."""
        return _length(self.size, self.mode)

    @property
    def per_row(self) -> int:
        """Chunks of a row that is not packed."""
        return -(-self.tokens // self.length)

    def grid(self, parts: int) -> tuple[int, int, int]:
        """Programs of a pass over chunks, ``parts`` for each chunk and head."""
        return self.chunks, self.heads, parts

    @property
    def places(self) -> tuple[int, int, int]:
        """What tells a kernel where a chunk lies."""
        return self.tokens, self.per_row, self.heads

    @property
    def shape(self) -> dict[str, Any]:
        """What such a kernel is compiled for."""
        return {"L": self.length, "N": self.size, "MODE": self.mode, "PACKED": self.packed}

    @property
    def narrow(self) -> torch.dtype:
        """What operands of products are kept in between passes: no wider than the product sees them."""
        return torch.bfloat16 if self.mode == "bf16" else torch.float32

    @property
    def inverse_modes(self) -> tuple[str, str]:
        """How products round while a triangle is inverted: inside tiles and between them."""
        if self.mode == "fp32":
            return "fp32", "fp32"
        return "tf32x3", "tf32x3" if self.mode == "tf32x3" else "tf32"

    def blocks(self, like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Work space: one block of ``shape`` for each chunk and head."""
        return like.new_empty(self.chunks, self.heads, *shape, dtype=dtype)


def chunk_length(size: int, dtype: torch.dtype) -> int:
    """L for heads of ``size`` channels of ``dtype``."""
    return _length(size, dot_mode(dtype))


def _length(size: int, mode: str) -> int:
    # as long as registers last: fp32 operands take twice those of bf16, and split into tf32 halves twice as many again
    longest = {"tf32": 32, "tf32x3": 16}.get(mode, 64)
    return longest if size <= 64 else min(longest, 32)


@triton.jit(do_not_specialize=["tokens", "per_row", "heads"])
def chunk_operands(  # type: ignore[no-untyped-def]  # noqa: ANN201
    r, w, k, a, b, table, R, A, K, B, M, start, end, tokens, per_row, heads,  # noqa: ANN001
    L: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, FINE: tl.constexpr, COARSE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Decayed operands and M of one chunk of one head: grid (chunks, H)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, count = place_of_chunk(table, chunk, tokens, per_row, L, PACKED)
    block = chunk.to(tl.int64) * heads + head
    c, e, middle, total = chunk_decays(w, first, count, head, heads, L, N)
    tl.store(start + block * N + tl.arange(0, N), tl.exp(middle))
    tl.store(end + block * N + tl.arange(0, N), tl.exp(total - middle))
    store_block(R, load_tokens(r, first, count, head, heads, L, N) * tl.exp(c - middle), block, L, N)
    store_block(K, load_tokens(k, first, count, head, heads, L, N) * tl.exp(middle - c), block, L, N)
    removal = load_tokens(a, first, count, head, heads, L, N) * tl.exp(e - middle)
    store_block(A, removal, block, L, N)
    write = load_tokens(b, first, count, head, heads, L, N) * tl.exp(middle - c)
    store_block(B, write, block, L, N)
    store_block(M, inverse(seen(dot(removal, tl.trans(write), MODE), L, True), L, FINE, COARSE), block, L, L)


@triton.jit(do_not_specialize=["tokens", "per_row", "heads"])
def chunk_maps(  # type: ignore[no-untyped-def]  # noqa: ANN201
    R, A, K, B, M, v, table, Q, Y0, E, C, tokens, per_row, heads,  # noqa: ANN001
    L: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):
    """What one chunk of one head does to any state: grid (chunks, H, 2), for E and Q and for C and Y0."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, count = place_of_chunk(table, chunk, tokens, per_row, L, PACKED)
    block = chunk.to(tl.int64) * heads + head
    solved = load_block(M, block, L, L)
    removal = load_block(A, block, L, N)
    # operands are loaded anew after a store: kept in registers from product to product they would not fit
    if tl.program_id(2) == 0:
        W = dot(solved, removal, MODE)
        store_transposed(E, dot(tl.trans(load_block(B, block, L, N)), W, MODE), block, N, N)
        receptance = load_block(R, block, L, N)
        A_rb = seen(dot(receptance, tl.trans(load_block(B, block, L, N)), MODE), L, False)
        store_block(Q, receptance.to(tl.float32) + dot(A_rb, W, MODE), block, L, N)
    else:
        key = load_block(K, block, L, N)
        value = load_tokens(v, first, count, head, heads, L, N).to(key.dtype)
        U = dot(solved, dot(seen(dot(removal, tl.trans(key), MODE), L, True), value, MODE), MODE).to(key.dtype)
        added = dot(tl.trans(key), value, MODE) + dot(tl.trans(load_block(B, block, L, N)), U, MODE)
        store_transposed(C, added, block, N, N)
        receptance = load_block(R, block, L, N)
        A_rb = seen(dot(receptance, tl.trans(load_block(B, block, L, N)), MODE), L, False)
        read = dot(A_rb, U, MODE)
        A_rk = seen(dot(receptance, tl.trans(load_block(K, block, L, N)), MODE), L, False)
        value = load_tokens(v, first, count, head, heads, L, N).to(key.dtype)
        store_block(Y0, read + dot(A_rk, value, MODE), block, L, N)


@triton.jit(do_not_specialize=["per_row", "heads"])
def scan(  # type: ignore[no-untyped-def]  # noqa: ANN201
    E, C, entry, leave, first, initial, met, final, per_row, heads,  # noqa: ANN001
    N: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Pass 2, R value rows of one sequence's head: grid (sequences, H, N / R).

    Over the chunks: S <- S diag(entry), which is written to ``met``; S <- (S + S E + C) diag(leave). If ``REVERSE``,
    over them from the last, with Eᵀ. What stays of S is no part of the product, where its rounding would pile up.
    """
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end = chunks_of_sequence(first, sequence, per_row, PACKED)
    own = (part * R + tl.arange(0, R))[:, None] * N + tl.arange(0, N)[None, :]
    whole = (sequence.to(tl.int64) * heads + head) * (N * N)
    S = tl.zeros((R, N), tl.float32)
    if INITIAL:
        S = tl.load(initial + whole + own).to(tl.float32)
    for i in range(0, end - begin):
        chunk = begin + i
        if REVERSE:
            chunk = end - 1 - i
        block = chunk.to(tl.int64) * heads + head
        S *= tl.load(entry + block * N + tl.arange(0, N))[None, :]
        tl.store(met + block * (N * N) + own, S.to(met.dtype.element_ty))
        across = load_block(E, block, N, N)
        if REVERSE:
            across = tl.trans(across)
        S += dot(S, across, MODE) + tl.load(C + block * (N * N) + own)
        S *= tl.load(leave + block * N + tl.arange(0, N))[None, :]
    tl.store(final + whole + own, S)


@triton.jit(do_not_specialize=["tokens", "per_row", "heads"])
def chunk_outputs(  # type: ignore[no-untyped-def]  # noqa: ANN201
    Q, Y0, states, table, y, tokens, per_row, heads,  # noqa: ANN001
    L: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):
    """Pass 3, one chunk of one head: grid (chunks, H)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, count = place_of_chunk(table, chunk, tokens, per_row, L, PACKED)
    block = chunk.to(tl.int64) * heads + head
    read = dot(load_block(Q, block, L, N), tl.trans(load_block(states, block, N, N)), MODE)
    store_tokens(y, read + load_block(Y0, block, L, N), first, count, head, heads, L, N)


@dataclass(frozen=True)
class Operands:
    """What pass 1 starts from: R, A, K and B, (chunks, H, L, N); M, (chunks, H, L, L); both halves' decays, fp32."""

    R: Tensor
    A: Tensor
    K: Tensor
    B: Tensor
    M: Tensor
    start: Tensor
    end: Tensor

    @classmethod
    def of(
        cls, plan: Plan, r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor, table: Tensor | None
    ) -> Operands:
        """Compute them for every chunk and head; there must be one."""
        length, size = plan.length, plan.size
        R, A, K, B = (plan.blocks(r, length, size, dtype=plan.narrow) for _ in range(4))
        inverses = plan.blocks(r, length, length, dtype=plan.narrow)
        start, end = plan.blocks(r, size), plan.blocks(r, size)
        fine, coarse = plan.inverse_modes
        # Triton for Hopper multiplies reshaped products wrongly where four warps share 64 rows, see ``dot``
        warps = 2 if length >= 64 and capability() // 10 == 9 else 4
        chunk_operands[plan.grid(1)](
            r, w, k, a, b, table, R, A, K, B, inverses, start, end, *plan.places,
            **plan.shape, FINE=fine, COARSE=coarse, num_warps=warps, num_stages=1,
        )
        return cls(R, A, K, B, inverses, start, end)


def launch_scan(
    plan: Plan, across: Tensor, added: Tensor, entry: Tensor, leave: Tensor, first: Tensor | None,
    initial: Tensor | None, *, reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Run the scan; ``initial`` (sequences, H, N, N) or None for zeros.

    Returns: what each chunk meets, (chunks, H, N, N), and what the last leaves, (sequences, H, N, N) in fp32.
    """
    size = plan.size
    met = plan.blocks(across, size, size, dtype=plan.narrow)
    final = across.new_empty(plan.sequences, plan.heads, size, size, dtype=torch.float32)
    if final.numel():
        scan[(plan.sequences, plan.heads, size // ROWS)](
            across, added, entry, leave, first, initial, met, final, plan.per_row, plan.heads,
            N=size, R=ROWS, MODE=plan.mode, PACKED=plan.packed, INITIAL=initial is not None, REVERSE=reverse,
            # as many chunks ahead as 99 KB of shared memory hold
            num_warps=4, num_stages=3 if size * size * across.element_size() <= 32768 else 1,
        )
    return met, final


def forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
    table: Tensor | None, first: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read and update the state; contiguous tensors, shapes as ``rwkvpeft.ops.wkv7``.

    Args:
        table, first: of ``Sequences.chunk_tables``, or None.
    Returns: y; the final states in fp32; the states that chunks start from, decayed to their middles,
        (chunks, H, N, N).
    """
    plan = Plan.of(v, table, first)
    length, size = plan.length, plan.size
    y = torch.empty_like(v)
    if not y.numel():
        final = v.new_zeros(plan.sequences, plan.heads, size, size, dtype=torch.float32)
        return y, final if state is None else final.copy_(state), plan.blocks(v, size, size, dtype=plan.narrow)
    given = Operands.of(plan, r, w, k, a, b, table)
    queries = plan.blocks(v, length, size, dtype=plan.narrow)
    local = plan.blocks(v, length, size)
    across = plan.blocks(v, size, size, dtype=plan.narrow)
    added = plan.blocks(v, size, size)
    chunk_maps[plan.grid(2)](
        given.R, given.A, given.K, given.B, given.M, v, table, queries, local, across, added, *plan.places,
        **plan.shape, num_warps=8 if plan.size > 64 else 4, num_stages=1,
    )
    states, final = launch_scan(plan, across, added, given.start, given.end, first, state, reverse=False)
    chunk_outputs[plan.grid(1)](
        queries, local, states, table, y, *plan.places, **plan.shape, num_warps=4, num_stages=1
    )
    return y, final, states
