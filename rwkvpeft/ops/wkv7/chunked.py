"""wkv7 as matrix products over chunks of tokens, with its backward.

Letters: B batch, T tokens, H heads, N head size, G = B·H, n chunks, L tokens in a chunk; S is the state at a chunk's
start, (N values, N keys). Inside a chunk, with c_t the sum of the log decays up to and including token t and the
anchor g = c at the chunk's middle:

    P = [r e^(c_t - g); a e^(c_(t-1) - g)]      Q = [k e^(g - c_t); b e^(g - c_t)]      (2L rows, N columns)
    Z = [V; U]       where U is what the state answers to every a                      (2L rows, N columns)
    A = mask(P Qᵀ)   r rows see s <= t, a rows see s < t
    U = M (A_ak V + P_a Sᵀ),  M = (I - A_ab)^-1
    Y = A_r Z + P_r Sᵀ
    S' = (S + Zᵀ Q) diag(d)

S is kept multiplied by e^g of its chunk, which makes every factor of the chunk a factor of P or Q. A log decay is in
(-0.607, 0), so the largest factor is e^(0.607 (L/2 + 1)): 3e4 for L = 32.

Source: the WY form of "RWKV-7 Goose" (arXiv 2503.14456), appendix on parallel training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.chunks import ChunkGrid, cut
from rwkvpeft.ops.contract import Backend, Supports, check_operands, compute_dtype, wants_grad
from rwkvpeft.ops.opaque import opaque
from rwkvpeft.ops.sequences import Sequences

CHUNK = 32
STRONGEST = -math.exp(-0.5)
"""The log decay of a saturated logit."""


def wkv7(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv7``, ``sequences`` as ``taking_sequences`` says."""
    check_operands("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, {}, None if sequences else state)
    if v.shape[1] == 1 and sequences is None and not wants_grad(r, w, k, v, a, b, state):
        return _one_token(r, w, k, v, a, b, state)
    if state is not None:
        state = state.to(compute_dtype(r, w, k, v, a, b, state))
    return _Wkv7.apply(r, w, k, v, a, b, state, *cut(sequences, CHUNK, v.device))


def _one_token(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(r, w, k, v, a, b, state)
    receptance, decay_logit, key, value, removal, write = (x[:, 0].to(dtype) for x in (r, w, k, v, a, b))
    if state is None:
        memory = value[..., :, None] * key[..., None, :]
    else:
        state = state.to(dtype)
        removed = state @ removal[..., None]
        memory = state * torch.exp(STRONGEST * torch.sigmoid(decay_logit))[..., None, :]
        memory.addcmul_(removed, write[..., None, :]).addcmul_(value[..., :, None], key[..., None, :])
    return (memory @ receptance[..., None]).to(v.dtype).permute(0, 3, 1, 2), memory


def _anchored_sums(length: int, like: Tensor) -> Tensor:
    """Matrix (L + 1, L) that turns the gates of a chunk into the log decays c_(t-1) - g for t = 0..L."""
    after, token = torch.arange(length + 1, device=like.device)[:, None], torch.arange(length, device=like.device)
    middle = length // 2
    signs = ((token < after) & (token >= middle)).to(like.dtype) - ((token >= after) & (token < middle)).to(like.dtype)
    return signs * STRONGEST


def _causal(length: int, like: Tensor) -> Tensor:
    """Mask (2L, 2L) of A: r rows see s <= t, a rows s < t."""
    whole = torch.ones(length, length, dtype=like.dtype, device=like.device)
    rows = torch.cat([whole.tril(), whole.tril(-1)])
    return torch.cat([rows, rows], 1)


def _decay_factors(grid: ChunkGrid, w: Tensor, dtype: torch.dtype) -> Tensor:
    """e^(c_(t-1) - g) for t = 0..L of every chunk, (n, B, H, L + 1, N)."""
    # filling must not decay the state
    gate = grid.load(w, dtype, filling=-math.inf).sigmoid_()
    sums = _anchored_sums(grid.length, gate).expand(grid.matrices, -1, -1)
    factors = torch.bmm(sums, gate.view(grid.matrices, grid.length, grid.size)).exp_()
    return factors.view(*gate.shape[:3], grid.length + 1, grid.size)


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
    length: int, counts: list[int], tables: list[Tensor],
) -> list[Tensor]:
    """Output (B, T, H, N) and final state (B, H, N, N), and what ``_backward`` wants kept beside ``w``."""
    dtype = compute_dtype(r, w, k, v, a, b, state)
    grid = ChunkGrid.of(v, length, counts, tables)
    chunks, groups, size = grid.chunks, grid.groups, grid.size
    factors = _decay_factors(grid, w, dtype)
    before, after = factors[..., :-1, :], factors[..., 1:, :]
    p = grid.empty(2, length, size, like=v, dtype=dtype)
    q, z = torch.empty_like(p), torch.empty_like(p)
    torch.mul(grid.view(r), after, out=p[..., 0, :, :])
    torch.mul(grid.view(a), before, out=p[..., 1, :, :])
    torch.div(grid.view(k), after, out=q[..., 0, :, :])
    torch.div(grid.view(b), after, out=q[..., 1, :, :])
    z[..., 0, :, :].copy_(grid.view(v))
    p, q, z = (x.view(grid.matrices, 2 * length, size) for x in (p, q, z))

    A = torch.bmm(p, q.mT).mul_(_causal(length, p))
    identity = torch.eye(length, dtype=dtype, device=v.device)
    inverse = torch.linalg.solve_triangular(
        -A[:, length:, length:], identity.expand(grid.matrices, -1, -1), upper=False, unitriangular=True
    )
    W = torch.bmm(inverse, p[:, length:])
    U = torch.bmm(inverse, torch.bmm(A[:, length:, :length], z[:, :length]))
    across = torch.bmm(W.mT, q[:, length:])
    across.diagonal(dim1=1, dim2=2).add_(1)
    states = v.new_empty(chunks + grid.starts, groups, size, size, dtype=dtype)
    left = grid.left(states).view(-1, size, size)
    torch.bmm(z[:, :length].mT, q[:, :length], out=left).baddbmm_(U.mT, q[:, length:])

    start = factors[..., 0, :].reshape(chunks, groups, 1, size)
    behind = torch.cat((start, torch.ones_like(start[: grid.starts])))[grid.after]
    edge = factors[..., -1, :].reshape(start.shape) / behind
    if state is None:
        states[: grid.starts] = 0
    else:
        torch.div(grid.entering(state), start[: grid.starts], out=states[: grid.starts])
    scanned, edges = states.view(-1, size, size), edge.view(-1, 1, size)
    fresh = 0 if state is not None else grid.starts * groups
    for here, there in grid.scan():
        if here.start >= fresh:
            left[here].baddbmm_(scanned[here], across[here])
        torch.mul(left[here], edges[here], out=scanned[there])
    starts = scanned[: grid.matrices]
    U.baddbmm_(W, starts.mT)
    z[:, length:] = U
    y = torch.bmm(A[:, :length], z).baddbmm_(p[:, :length], starts.mT)
    final = grid.leaving(states[chunks:], state)
    return [grid.store(y, v.dtype), final, factors, edge, p, q, z, A, inverse, W, states]


def _forward_sizes(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
    length: int, counts: list[int], tables: list[Tensor],
) -> list[Tensor]:
    grid = ChunkGrid.of(v, length, counts, tables)
    dtype = compute_dtype(r, w, k, v, a, b, state)
    chunks, matrices, size = grid.chunks, grid.matrices, grid.size

    def own(*sizes: int) -> Tensor:
        return v.new_empty(sizes, dtype=dtype)

    return [
        torch.empty_like(v, memory_format=torch.contiguous_format),
        grid.leaving(own(grid.starts, grid.groups, size, size), state),
        grid.empty(length + 1, size, like=v, dtype=dtype),
        own(chunks, grid.groups, 1, size),
        *(own(matrices, 2 * length, size) for _ in range(3)),
        own(matrices, 2 * length, 2 * length),
        own(matrices, length, length).mT,
        own(matrices, length, size),
        own(chunks + grid.starts, grid.groups, size, size),
    ]


def _backward(
    dy: Tensor | None, dfinal: Tensor | None, w: Tensor, kept: list[Tensor], like: list[Tensor],
    length: int, counts: list[int], tables: list[Tensor], has_state: bool, state_alone: bool,
) -> list[Tensor]:
    """Gradients of r, w, k, v, a, b unless ``state_alone``, in the dtypes of ``like``, and of the state if any."""
    factors, edge, p, q, z, A, inverse, W, states = kept
    grid = ChunkGrid.of(w, length, counts, tables)
    chunks, groups, size = grid.chunks, grid.groups, grid.size
    d = grid.empty(2, length, size, like=p, dtype=p.dtype)
    if dy is None:
        d[..., 0, :, :] = 0
    else:
        d[..., 0, :, :].copy_(grid.view(dy))
    d = d.view(grid.matrices, 2 * length, size)
    du = torch.bmm(A[:, :length, length:].mT, d[:, :length])

    grads = torch.empty_like(states)
    grads[chunks:] = 0 if dfinal is None else grid.entering(dfinal)
    scanned, edges = grads.view(-1, size, size), edge.view(-1, 1, size)
    torch.bmm(d[:, :length].mT, p[:, :length], out=scanned[: grid.matrices]).baddbmm_(du.mT, W)
    across = torch.bmm(q[:, length:].mT, W)
    across.diagonal(dim1=1, dim2=2).add_(1)
    ends = torch.empty_like(across)
    for here, there in reversed(grid.scan()):
        torch.mul(scanned[there], edges[here], out=ends[here])
        if has_state or here.start >= grid.starts * groups:
            scanned[here].baddbmm_(ends[here], across[here])
    dstate = []
    if has_state:
        start = factors[: grid.starts, ..., 0, :].reshape(-1, groups, 1, size)
        dstate = [grid.leaving(grads[: grid.starts] / start, dfinal)]
    if state_alone:
        return dstate

    starts = states.view(-1, size, size)[: grid.matrices]
    du.baddbmm_(q[:, length:], ends.mT)
    d[:, length:] = torch.bmm(inverse.mT, du)
    dvc = torch.bmm(A[:, :, :length].mT, d).baddbmm_(q[:, :length], ends.mT)
    dA = torch.bmm(d, z.mT).mul_(_causal(length, A))
    dp = torch.bmm(dA, q).baddbmm_(d, starts)
    dq = torch.bmm(dA.mT, p).baddbmm_(z, ends)

    through = torch.mul(p, dp, out=d).addcmul_(q, dq, value=-1)
    later = torch.ones(length, length, dtype=dp.dtype, device=dp.device).triu()
    later = torch.cat([later, later.triu(1)], 1)
    dlog = torch.bmm(later.expand(grid.matrices, -1, -1), through).addcmul_(q[:, length:], dq[:, length:], value=-1)
    edges = grads.mul_(states).sum(2, keepdim=True)[grid.after]
    dlog = dlog.view(chunks, groups, length, size).add_(edges).view(*factors.shape[:3], length, size)

    before, after = factors[..., :-1, :], factors[..., 1:, :]
    dp, dq = (x.view(*factors.shape[:3], 2, length, size) for x in (dp, dq))
    # sigmoid(x) sigmoid(-x) by the smaller of the two, since 1 - sigmoid(x) loses every digit for a large x
    slope = torch.copysign(grid.load(w, dlog.dtype), -1.0).sigmoid_()
    slope = torch.addcmul(slope, slope, slope, value=-1).mul_(STRONGEST)
    rooms = [grid.room(p, x.dtype) for x in like]
    (_, dr), (_, dw), (_, dk), (_, dv), (_, da), (_, db) = rooms
    torch.mul(dp[..., 0, :, :], after, out=dr)
    torch.mul(dp[..., 1, :, :], before, out=da)
    torch.div(dq[..., 0, :, :], after, out=dk)
    torch.div(dq[..., 1, :, :], after, out=db)
    dv.copy_(dvc.view(dlog.shape))
    torch.mul(dlog, slope, out=dw)
    return [*(grid.trimmed(whole) for whole, _ in rooms), *dstate]


def _backward_sizes(
    dy: Tensor | None, dfinal: Tensor | None, w: Tensor, kept: list[Tensor], like: list[Tensor],
    length: int, counts: list[int], tables: list[Tensor], has_state: bool, state_alone: bool,
) -> list[Tensor]:
    grid = ChunkGrid.of(w, length, counts, tables)
    dstate = [grid.leaving(kept[0].new_empty(grid.starts, grid.groups, grid.size, grid.size), dfinal)]
    dstate = dstate if has_state else []
    return dstate if state_alone else [*(x.new_empty(w.shape) for x in like), *dstate]


_forward_op = opaque(
    "wkv7_torch_forward",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, int length, "
    "int[] counts, Tensor[] tables) -> Tensor[]",
    _forward,
    _forward_sizes,
    in_pytorch=True,
)
_backward_op = opaque(
    "wkv7_torch_backward",
    "(Tensor? dy, Tensor? dfinal, Tensor w, Tensor[] kept, Tensor[] like, int length, int[] counts, "
    "Tensor[] tables, bool has_state, bool state_alone) -> Tensor[]",
    _backward,
    _backward_sizes,
    in_pytorch=True,
)


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
        length: int, counts: tuple[int, ...], tables: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        y, final, *kept = _forward_op(r, w, k, v, a, b, state, length, counts, tables)
        # of the operands only the dtypes are kept
        like = [x.new_empty(0) for x in (r, w, k, v, a, b)]
        ctx.save_for_backward(w, *like, *tables, *kept)
        ctx.length, ctx.counts, ctx.tables, ctx.has_state = length, counts, len(tables), state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        w, *saved = ctx.saved_tensors
        state_alone = not any(ctx.needs_input_grad[:6])
        like, tables, kept = saved[:6], saved[6 : 6 + ctx.tables], saved[6 + ctx.tables :]
        grads = _backward_op(
            dy, dfinal, w, kept, like, ctx.length, ctx.counts, tables, ctx.has_state, state_alone
        )
        dstate = grads[-1] if ctx.has_state else None
        return *((None,) * 6 if state_alone else grads[:6]), dstate, None, None, None


BACKEND = Backend("torch", "chunked matrix products", wkv7, Supports(), packed=True)
