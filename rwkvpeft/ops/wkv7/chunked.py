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

Source: the WY form of "RWKV-7 Goose" (arXiv 2503.14456), appendix on parallel training; the inverse by block
elimination is from Higham, "Accuracy and Stability of Numerical Algorithms", chapter 14.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.chunks import ChunkGrid
from rwkvpeft.ops.contract import Backend, Supports, check_operands, compute_dtype

CHUNK = 32
STRONGEST = -math.exp(-0.5)
"""The log decay of a saturated logit."""


def wkv7(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv7``."""
    check_operands("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, {}, state)
    if v.shape[1] == 1 and not (torch.is_grad_enabled() and _any_grad(r, w, k, v, a, b, state)):
        return _one_token(r, w, k, v, a, b, state)
    if state is not None:
        state = state.to(compute_dtype(r, w, k, v, a, b, state))
    return _Wkv7.apply(r, w, k, v, a, b, state, CHUNK)


def _any_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
        memory += torch.cat([removed, value[..., None]], -1) @ torch.stack([write, key], -2)
    return (memory @ receptance[..., None]).to(v.dtype).permute(0, 3, 1, 2), memory


def inverse_of_unit_lower(below: Tensor) -> Tensor:
    """(I - A)^-1 of strictly lower triangular A (.., L, L), L a power of two, by block elimination.

    Exact elimination needs log2(L) levels and, unlike the product (I + A)(I + A²)(I + A⁴).., no large terms that cancel.
    """
    length = below.shape[-1]
    place = torch.arange(length, device=below.device)
    inverse = torch.eye(length, dtype=below.dtype, device=below.device)
    inverse = inverse + below * _joining(place, 1)
    size = 2
    while size < length:
        joined = (below * _joining(place, size)) @ inverse
        inverse = torch.baddbmm(inverse, inverse, joined)
        size *= 2
    return inverse


def _joining(place: Tensor, size: int) -> Tensor:
    """Mask (L, L) of the entries that join the two halves of every diagonal block of 2·size rows."""
    same = place[:, None] // (2 * size) == place // (2 * size)
    return same & (place[:, None] // size % 2 == 1) & (place // size % 2 == 0)


def _anchored_sums(length: int, like: Tensor) -> Tensor:
    """Matrix (L + 1, L) that turns the log decays of a chunk into c_(t-1) - g for t = 0..L."""
    after, token = torch.arange(length + 1, device=like.device)[:, None], torch.arange(length, device=like.device)
    middle = length // 2
    sums = ((token < after) & (token >= middle)).to(like.dtype) - ((token >= after) & (token < middle)).to(like.dtype)
    return sums


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(r, w, k, v, a, b, state)
        batch, tokens, heads, size = v.shape
        grid = ChunkGrid(batch, tokens, heads, size, length)
        chunks, groups = grid.chunks, grid.groups
        G = chunks * groups

        gate = grid.load(w, dtype).sigmoid_()
        if grid.filling:
            gate[-1, ..., length - grid.filling :, :] = 0
        sums = _anchored_sums(length, gate) * STRONGEST
        factors = torch.bmm(sums.expand(G, -1, -1), gate.view(G, length, size)).exp_()
        factors = factors.view(chunks, batch, heads, length + 1, size)
        before, after = factors[..., :-1, :], factors[..., 1:, :]

        p = grid.empty(2, length, size, like=v, dtype=dtype)
        q, z = torch.empty_like(p), torch.empty_like(p)
        torch.mul(grid.view(r), after, out=p[..., 0, :, :])
        torch.mul(grid.view(a), before, out=p[..., 1, :, :])
        torch.div(grid.view(k), after, out=q[..., 0, :, :])
        torch.div(grid.view(b), after, out=q[..., 1, :, :])
        z[..., 0, :, :].copy_(grid.view(v))
        p, q, z = (x.view(G, 2 * length, size) for x in (p, q, z))

        A = torch.bmm(p, q.mT)
        A.mul_(_causal(length, A))
        inverse = inverse_of_unit_lower(A[:, length:, length:])
        W = torch.bmm(inverse, p[:, length:])
        torch.bmm(inverse, torch.bmm(A[:, length:, :length], z[:, :length]), out=z[:, length:])

        edge = factors[..., -1, :].reshape(chunks, groups, 1, size).clone()
        start = factors[..., 0, :].reshape(chunks, groups, 1, size)
        edge[:-1] /= start[1:]
        S = v.new_empty(chunks + 1, groups, size, size, dtype=dtype)
        if state is None:
            S[0] = 0
        else:
            torch.div(state.reshape(groups, size, size), start[0], out=S[0])
        by_chunk = [x.view(chunks, groups, -1, size) for x in (W, q, z)]
        for i in range(chunks):
            W_i, q_i, z_i = (x[i] for x in by_chunk)
            if i or state is not None:
                z_i[:, length:].baddbmm_(W_i, S[i].mT)
            torch.baddbmm(S[i], z_i.mT, q_i, out=S[i + 1]).mul_(edge[i])
        y = torch.bmm(A[:, :length], z)
        y.baddbmm_(p[:, :length], S[:-1].reshape(G, size, size).mT)

        ctx.save_for_backward(w, factors, edge, p, q, z, A, inverse, W, S)
        ctx.grid, ctx.has_state = grid, state is not None
        ctx.dtypes = [x.dtype for x in (r, w, k, v, a, b)]
        ctx.set_materialize_grads(False)
        return grid.store(y, v), S[-1].view(batch, heads, size, size).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        w, factors, edge, p, q, z, A, inverse, W, S = ctx.saved_tensors
        grid: ChunkGrid = ctx.grid
        chunks, groups, length, size = grid.chunks, grid.groups, grid.length, grid.size
        G = chunks * groups
        d = p.new_empty(chunks, grid.batch, grid.heads, 2, length, size)
        if dy is None:
            d[..., 0, :, :] = 0
        else:
            d[..., 0, :, :].copy_(grid.view(dy))
        d = d.view(G, 2 * length, size)
        du = torch.bmm(A[:, :length, length:].mT, d[:, :length])

        H = S.new_empty(chunks, groups, size, size)
        grad = torch.zeros_like(S[0]) if dfinal is None else dfinal.reshape(groups, size, size).to(S.dtype)
        colsum = S.new_empty(chunks, groups, 1, size)
        rw = torch.cat([p[:, :length], W], 1).view(chunks, groups, 2 * length, size)
        du, dyc, qc = (x.view(chunks, groups, -1, size) for x in (du, d, q))
        dyu = torch.empty_like(rw)
        dyu[:, :, :length] = dyc[:, :, :length]
        for i in reversed(range(chunks)):
            torch.sum(S[i + 1] * grad, 1, keepdim=True, out=colsum[i])
            torch.mul(grad, edge[i], out=H[i])
            torch.baddbmm(du[i], qc[i, :, length:], H[i].mT, out=dyu[i, :, length:])
            grad = torch.baddbmm(H[i], dyu[i].mT, rw[i])
        dstate = None
        if ctx.has_state:
            grad = grad / factors[0, ..., 0, :].reshape(groups, 1, size)
            dstate = grad.view(grid.batch, grid.heads, size, size)

        H = H.view(G, size, size)
        torch.bmm(inverse.mT, dyu.view(G, 2 * length, size)[:, length:], out=d[:, length:])
        dv = torch.bmm(A[:, :, :length].mT, d).baddbmm_(q[:, :length], H.mT)
        dA = torch.bmm(d, z.mT).mul_(_causal(length, A))
        dp = torch.bmm(dA, q).baddbmm_(d, S[:-1].reshape(G, size, size))
        dq = torch.bmm(dA.mT, p).baddbmm_(z, H)
        p_dp = (p * dp).view(G, 2, length, size)
        q_dq = (q * dq).view(G, 2, length, size)
        dc = p_dp[:, 0] + p_dp[:, 1] - q_dq[:, 0] - q_dq[:, 1]
        total = torch.ones(length, length, dtype=dc.dtype, device=dc.device).triu().expand(G, -1, -1)
        dlog = torch.bmm(total, dc).sub_(p_dp[:, 1]).add_(colsum.view(G, 1, size))

        shape = (chunks, grid.batch, grid.heads, length, size)
        before, after = factors[..., :-1, :], factors[..., 1:, :]
        dp, dq = (x.view(*shape[:3], 2, length, size) for x in (dp, dq))
        dr = dp[..., 0, :, :] * after
        da = dp[..., 1, :, :] * before
        dk = dq[..., 0, :, :] / after
        db = dq[..., 1, :, :] / after
        logit = grid.load(w, dlog.dtype)
        # 1 - sigmoid(x) loses every digit for a large x; sigmoid(-x) does not
        dw = dlog.view(shape) * STRONGEST * torch.sigmoid(logit) * torch.sigmoid(-logit)
        out = [
            grid.store(g, g.new_empty(0, dtype=t))
            for g, t in zip((dr, dw, dk, dv.view(shape), da, db), ctx.dtypes, strict=True)
        ]
        return *out, dstate, None


def _causal(length: int, like: Tensor) -> Tensor:
    whole = torch.ones(length, length, dtype=like.dtype, device=like.device)
    rows = torch.cat([whole.tril(), whole.tril(-1)])
    return torch.cat([rows, rows], 1)


BACKEND = Backend("torch", "chunked matrix products", wkv7, Supports())
