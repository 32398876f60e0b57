"""wkv5 and wkv6 as matrix products over chunks: the recurrences whose decay acts on each key channel alone.

Letters: B batch, T tokens, H heads, N head size, G = B·H, n chunks, L tokens in a chunk, tiles of ``TILE`` tokens in a
chunk; S is the state at a chunk's start, (N values, N keys). E(i) is the sum of a chunk's log decays before token i,
so token t reads token s < t through e^(E(t) - E(s+1)), at most 1. As a product of one factor of t and one of s:

- in a tile both are relative to E at its middle: P_t = r_t e^(E(t) - mid), Q_s = k_s e^(mid - E(s+1)). A log decay
  below -``LIMITS`` is taken as that limit, which changes the decay by less than rounding does and bounds the factors;
- between the halves of a block of 2, 4, .. tiles both are relative to E at the border, and both at most 1;
- between tokens and the states at the chunk's ends likewise.

All but the first are P or Q times one number per tile and channel. Nothing overflows, however strong the decays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.chunks import ChunkGrid, cut
from rwkvpeft.ops.contract import compute_dtype
from rwkvpeft.ops.diagonal_decay import TILE, Factors, constant_decay_grad, decay_grad, decay_table
from rwkvpeft.ops.opaque import opaque
from rwkvpeft.ops.sequences import Sequences

CHUNK = 32


def read_chunks(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence of ``rwkvpeft.ops.wkv6``; ``w`` may be (H, N), one decay for all tokens."""
    if state is not None:
        state = state.to(compute_dtype(r, w, k, v, u, state))
    if sequences is not None:
        return _Diagonal.apply(r, w.expand(v.shape), k, v, u, state, *cut(sequences, CHUNK, v.device))
    whole = v.shape[1] // CHUNK * CHUNK
    uncut = cut(None, CHUNK, v.device)
    if w.dim() == 4 or (v.shape[1] == whole and whole):
        return _Diagonal.apply(r, w, k, v, u, state, *uncut)
    # the filling of the last chunk must not decay the state, so that there the decay does change
    read = []
    if whole:
        y, state = _Diagonal.apply(r[:, :whole], w, k[:, :whole], v[:, :whole], u, state, *uncut)
        read.append(y)
    rest = v[:, whole:]
    y, state = _Diagonal.apply(r[:, whole:], w.expand(rest.shape), k[:, whole:], rest, u, state, *uncut)
    return torch.cat([*read, y], 1), state


def read_one_token(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``read_chunks`` for T = 1, without chunks and without a backward of its own."""
    dtype = compute_dtype(r, w, k, v, u, state)
    receptance, key, value = (x[:, 0].to(dtype) for x in (r, k, v))
    read = (receptance * u * key).sum(-1, keepdim=True) * value
    memory = value[..., :, None] * key[..., None, :]
    if state is not None:
        state = state.to(dtype)
        read = read + (state @ receptance[..., None])[..., 0]
        decay = torch.exp(-torch.exp((w if w.dim() == 2 else w[:, 0]).to(dtype)))
        memory = torch.addcmul(memory, state, decay[..., None, :])
    return read.to(v.dtype)[:, None], memory


def _scaled(tiled: Tensor, factor: Tensor) -> Tensor:
    """Tiled operand (n, B, H, m, TILE, N) times one factor per tile, as matrices (n·G, L, N)."""
    return torch.mul(tiled, factor).flatten(3, 4).flatten(0, 2)


def _halves(tiled: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """First and second halves of blocks of 2^(level + 1) tiles of (.., m, x, N), each (.., blocks, tiles, x, N)."""
    blocks = tiled.unflatten(-3, (-1, 2, 2**level))
    return blocks[..., 0, :, :, :], blocks[..., 1, :, :, :]


def _rectangles(A: Tensor, half: int) -> Tensor:
    """View (n·G, blocks, half, half) of what second halves read of first halves in A (n·G, L, L)."""
    blocks = A.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return blocks[:, :, 1, :, :, 0, :].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _in_tiles(length: int, device: torch.device) -> Tensor:
    """Mask (L, L): t reads s in its own tile."""
    token = torch.arange(length, device=device)
    return (token < token[:, None]) & (token // TILE == token[:, None] // TILE)


def _products(grid: ChunkGrid, r: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """r ⊙ k, chunked (n, B, H, L, N)."""
    room = grid.empty(grid.length, grid.size, like=r, dtype=dtype)
    return torch.mul(grid.view(r).to(dtype), grid.view(k), out=room)


def _received(partner: Tensor, current: Tensor, previous: Tensor, bonus: Tensor, shift: tuple[int, int]) -> Tensor:
    """Gradient of r, or k, through the bonus and the undecayed neighbour; ``partner`` is k, or r, (n, B, H, L, N).

    Args:
        current, previous: gradient of what a token reads of itself (.., L, 1) and of its neighbour (.., L - 1, 1).
        bonus: u, (H, 1, N).
        shift: the first token that has a neighbour, and that neighbour.
    """
    direct = torch.mul(current, partner, out=current.new_empty(partner.shape)).mul_(bonus)
    pairs = previous.shape[-2]
    here, there = (slice(start, start + pairs) for start in shift)
    direct[..., here, :].addcmul_(previous, partner[..., there, :])
    return direct


def _second_halves(p: Tensor, factor: Tensor, level: int) -> Tensor:
    """P of second halves relative to the border before them, (blocks, half, N)."""
    return torch.mul(_halves(p, level)[1], _halves(factor, level)[1]).view(-1, TILE * 2**level, p.shape[-1])


def _first_halves(q: Tensor, factor: Tensor, level: int) -> Tensor:
    """Q of first halves relative to the border behind them, (blocks, half, N)."""
    return torch.mul(_halves(q, level)[0], _halves(factor, level)[0]).view(-1, TILE * 2**level, q.shape[-1])


def _readers_grad(dA: Tensor, q: Tensor, across: list[Tensor]) -> Tensor:
    """Gradient of P through A (n·G, L, L), shaped as Q (n, B, H, m, TILE, N)."""
    length, size = dA.shape[-1], q.shape[-1]
    own = dA.masked_fill(~_in_tiles(length, dA.device), 0)
    grad = torch.bmm(own, q.view(-1, length, size)).view(q.shape)
    for level, factor in enumerate(across):
        block = _rectangles(dA, TILE * 2**level).flatten(0, 1)
        second = _halves(grad, level)[1]
        read = torch.bmm(block, _first_halves(q, factor, level)).view(second.shape)
        second.addcmul_(read, _halves(factor, level)[1])
    return grad


def _writers_grad(dA: Tensor, p: Tensor, across: list[Tensor]) -> Tensor:
    """Gradient of Q through A (n·G, L, L), shaped as P (n, B, H, m, TILE, N)."""
    length, size = dA.shape[-1], p.shape[-1]
    own = dA.masked_fill(~_in_tiles(length, dA.device), 0)
    grad = torch.bmm(own.mT, p.view(-1, length, size)).view(p.shape)
    for level, factor in enumerate(across):
        block = _rectangles(dA, TILE * 2**level).flatten(0, 1)
        first = _halves(grad, level)[0]
        written = torch.bmm(block.mT, _second_halves(p, factor, level)).view(first.shape)
        first.addcmul_(written, _halves(factor, level)[0])
    return grad


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None,
    length: int, counts: list[int], tables: list[Tensor],
) -> list[Tensor]:
    """Output (B, T, H, N) and final state (B, H, N, N), and what ``_backward`` wants kept beside ``r, w, k, u``."""
    dtype = compute_dtype(r, w, k, v, u, state)
    grid = ChunkGrid.of(v, length, counts, tables)
    chunks, groups, size = grid.chunks, grid.groups, grid.size
    strength, table = decay_table(grid, w, dtype)
    factors = Factors.of(table, length)
    p = grid.empty(length // TILE, TILE, size, like=v, dtype=dtype)
    q = torch.empty_like(p)
    torch.mul(grid.view(r).unflatten(3, (-1, TILE)), factors.tile[..., :-1, :], out=p)
    torch.div(grid.view(k).unflatten(3, (-1, TILE)), factors.tile[..., 1:, :], out=q)
    z = grid.load(v, dtype).flatten(0, 2)

    A = torch.bmm(p.view_as(z), q.view_as(z).mT)
    # what two tiles far apart give here may be infinite, or infinite minus infinite
    A.masked_fill_(~_in_tiles(length, v.device), 0)
    for level, factor in enumerate(factors.across):
        block = _rectangles(A, TILE * 2**level)
        read = torch.bmm(_second_halves(p, factor, level), _first_halves(q, factor, level).mT)
        block.copy_(read.view(block.shape))
    bonus = u.to(dtype).expand(chunks, grid.batch, -1, -1).reshape(-1, size, 1)
    products = _products(grid, r, k, dtype).view_as(z)
    A.diagonal(dim1=1, dim2=2).copy_(torch.bmm(products, bonus).squeeze(2))

    states = v.new_empty(chunks + grid.starts, groups, size, size, dtype=dtype)
    states[: grid.starts] = 0 if state is None else grid.entering(state)
    left, scanned = grid.left(states).view(-1, size, size), states.view(-1, size, size)
    torch.bmm(z.mT, _scaled(q, factors.to_end), out=left)
    whole = factors.whole.expand(chunks, grid.batch, -1, -1, -1).reshape(-1, 1, size)
    for here, there in grid.scan():
        torch.addcmul(left[here], scanned[here], whole[here], out=scanned[there])
    y = torch.bmm(A, z)
    y.baddbmm_(_scaled(p, factors.from_start), scanned[: grid.matrices].mT)

    final = grid.leaving(states[chunks:], state)
    return [grid.store(y, v.dtype), final, strength, table, p, q, z, A, states]


def _forward_sizes(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None,
    length: int, counts: list[int], tables: list[Tensor],
) -> list[Tensor]:
    grid = ChunkGrid.of(v, length, counts, tables)
    dtype = compute_dtype(r, w, k, v, u, state)
    chunks, size, tiles = grid.chunks, grid.size, length // TILE
    leading = (1, 1, grid.heads) if w.dim() == 2 else (chunks, grid.batch, grid.heads)
    # of each tile its tokens' borders, then from its middle to the chunk's ends and to the borders of larger blocks
    borders = tiles * (TILE + 1) + tiles * (2 + (tiles - 1).bit_length()) + 1

    def own(*sizes: int) -> Tensor:
        return v.new_empty(sizes, dtype=dtype)

    return [
        torch.empty_like(v, memory_format=torch.contiguous_format),
        grid.leaving(own(grid.starts, grid.groups, size, size), state),
        own(*leading, length, size),
        own(*leading, borders, size),
        *(grid.empty(tiles, TILE, size, like=v, dtype=dtype) for _ in range(2)),
        own(grid.matrices, length, size),
        own(grid.matrices, length, length),
        own(chunks + grid.starts, grid.groups, size, size),
    ]


def _backward(
    dy: Tensor | None, dfinal: Tensor | None, operands: list[Tensor], kept: list[Tensor], like: Tensor,
    length: int, counts: list[int], tables: list[Tensor], has_state: bool, state_alone: bool,
) -> list[Tensor]:
    """Gradients of r, w, k, v, u unless ``state_alone``, and of the state if there is one; ``like`` has v's dtype."""
    r, w, k, u = operands
    strength, table, p, q, z, A, states = kept
    grid = ChunkGrid.of(r, length, counts, tables)
    chunks, size = grid.chunks, grid.size
    factors = Factors.of(table, length)
    d = torch.zeros_like(z) if dy is None else grid.load(dy, z.dtype).view_as(z)

    grads = torch.empty_like(states)
    grads[chunks:] = 0 if dfinal is None else grid.entering(dfinal)
    scanned = grads.view(-1, size, size)
    torch.bmm(d.mT, _scaled(p, factors.from_start), out=scanned[: grid.matrices])
    whole = factors.whole.expand(chunks, grid.batch, -1, -1, -1).reshape(-1, 1, size)
    for here, there in reversed(grid.scan()):
        scanned[here].addcmul_(scanned[there], whole[here])
    dstate = [grid.leaving(grads[: grid.starts], dfinal)] if has_state else []
    if state_alone:
        return dstate

    starts, ends = states.view(-1, size, size)[: grid.matrices], grads[grid.after].view(-1, size, size)
    dv = torch.bmm(A.mT, d).baddbmm_(_scaled(q, factors.to_end), ends.mT)
    dA = torch.bmm(d, z.mT)
    current, previous = dA.diagonal(dim1=1, dim2=2).clone(), dA.diagonal(-1, dim1=1, dim2=2).clone()
    # a token reads its neighbour undecayed: next to a strong decay's gradient these pairs would leave only rounding
    dA.diagonal(-1, dim1=1, dim2=2).zero_()
    dp, dq = _readers_grad(dA, q, factors.across), _writers_grad(dA, p, factors.across)
    dp_state = torch.bmm(d, starts).view(p.shape).mul_(factors.from_start)
    dq_state = torch.bmm(z, ends).view(p.shape).mul_(factors.to_end)
    edges = torch.mul(starts, ends).sum(1).view(chunks, grid.batch, grid.heads, 1, size).mul_(factors.whole)
    if w.dim() == 2:
        token = torch.arange(length, device=z.device)
        inside = _readers_grad(dA * (token[:, None] - token - 1).clamp(min=0), q, factors.across)
        dw = constant_decay_grad(strength, (p, q), (dp_state, dq_state), edges, inside)
    else:
        edges -= torch.mul(q, dq).sum((3, 4)).unsqueeze(3)
    dp += dp_state
    dq += dq_state
    if w.dim() == 4:
        dw = decay_grad(grid, strength, (p, q), (dp, dq), edges, w.dtype)

    row = (chunks, grid.batch, grid.heads, -1, 1)
    current, previous, bonus = current.view(row), previous.view(row), u.to(z.dtype)[:, None, :]
    du = _products(grid, r, k, z.dtype).mul_(current).sum((0, 1, 3))
    dr = _received(grid.view(k), current, previous, bonus, (1, 0)).view(p.shape)
    dr = grid.store(dr.addcmul_(dp, factors.tile[..., :-1, :]), r.dtype)
    dk = _received(grid.view(r), current, previous, bonus, (0, 1)).view(p.shape)
    dk = grid.store(dk.addcdiv_(dq, factors.tile[..., 1:, :]), k.dtype)
    return [dr, dw, dk, grid.store(dv, like.dtype), du, *dstate]


def _backward_sizes(
    dy: Tensor | None, dfinal: Tensor | None, operands: list[Tensor], kept: list[Tensor], like: Tensor,
    length: int, counts: list[int], tables: list[Tensor], has_state: bool, state_alone: bool,
) -> list[Tensor]:
    r, w, k, u = operands
    grid = ChunkGrid.of(r, length, counts, tables)
    dstate = [grid.leaving(kept[0].new_empty(grid.starts, grid.groups, grid.size, grid.size), dfinal)]
    dstate = dstate if has_state else []
    if state_alone:
        return dstate
    dw = w.new_empty(w.shape, dtype=kept[0].dtype if w.dim() == 2 else w.dtype)
    du = kept[0].new_empty(u.shape)
    return [r.new_empty(r.shape), dw, k.new_empty(r.shape), like.new_empty(r.shape), du, *dstate]


_forward_op = opaque(
    "wkv_diagonal_torch_forward",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, Tensor? state, int length, int[] counts, "
    "Tensor[] tables) -> Tensor[]",
    _forward,
    _forward_sizes,
    in_pytorch=True,
)
_backward_op = opaque(
    "wkv_diagonal_torch_backward",
    "(Tensor? dy, Tensor? dfinal, Tensor[] operands, Tensor[] kept, Tensor like, int length, int[] counts, "
    "Tensor[] tables, bool has_state, bool state_alone) -> Tensor[]",
    _backward,
    _backward_sizes,
    in_pytorch=True,
)


class _Diagonal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None,
        length: int, counts: tuple[int, ...], tables: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        y, final, *kept = _forward_op(r, w, k, v, u, state, length, counts, tables)
        ctx.save_for_backward(r, w, k, u, v.new_empty(0), *tables, *kept)
        ctx.length, ctx.counts, ctx.tables, ctx.has_state = length, counts, len(tables), state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        r, w, k, u, like, *rest = ctx.saved_tensors
        tables, kept = rest[: ctx.tables], rest[ctx.tables :]
        state_alone = not any(ctx.needs_input_grad[:5])
        grads = _backward_op(
            dy, dfinal, [r, w, k, u], kept, like, ctx.length, ctx.counts, tables, ctx.has_state, state_alone
        )
        dstate = grads[-1] if ctx.has_state else None
        return *((None,) * 5 if state_alone else grads[:5]), dstate, None, None, None
