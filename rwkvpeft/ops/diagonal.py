"""wkv5 and wkv6 as matrix products over chunks: the recurrences whose decay acts on each key channel alone.

Letters: B batch, T tokens, H heads, N head size, G = B·H, n chunks, L tokens in a chunk; S is the state at a chunk's
start, (N values, N keys).

A chunk is halved again and again. At half size h, token t of the second half of a block of 2h reads token s of the
first half through the product of the decays between them, which splits at the border into two factors that are both
at most 1:  r_t Π(border..t-1) · k_s Π(s+1..border-1).  No exponent is ever positive, so nothing overflows however
strong the decays, and the gradient of a log decay is a plain sum over pairs it lies between: no large terms cancel.
From h to 2h only the second halves of r and the first halves of k change, by the decay of a whole block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.chunks import ChunkGrid
from rwkvpeft.ops.contract import compute_dtype

CHUNK = 32


def read_chunks(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence of ``wkv6`` from log decays (B, T, H, N) or, when they never change, (H, N).

    Other arguments as ``rwkvpeft.ops.wkv6``; ``log_decay`` <= 0 in the dtype to calculate in.
    """
    if state is not None:
        state = state.to(compute_dtype(r, log_decay, k, v, u, state))
    return _Diagonal.apply(r, log_decay, k, v, u, state, CHUNK)


def read_one_token(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``read_chunks`` for T = 1, without the chunks."""
    dtype = compute_dtype(r, log_decay, k, v, u, state)
    receptance, key, value = (x[:, 0].to(dtype) for x in (r, k, v))
    read = (receptance * u * key).sum(-1, keepdim=True) * value
    memory = value[..., :, None] * key[..., None, :]
    if state is not None:
        state = state.to(dtype)
        read = read + (state @ receptance[..., None])[..., 0]
        decay = log_decay.exp() if log_decay.dim() == 2 else log_decay[:, 0].exp()
        memory = torch.addcmul(memory, state, decay[..., None, :])
    return read.to(v.dtype)[:, None], memory


def _block_decays(grid: ChunkGrid, log_decay: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Decay over every aligned block of 1, 2, 4, .. L tokens: entry i broadcasts to (n, B, H, L / 2^i, N)."""
    # exp of a sum, not a product of exps: a weak decay, rounded, would be wrong by L roundings
    if log_decay.dim() == 2:
        sums = [log_decay[:, None, :] * 2**i for i in range(grid.length.bit_length())]
    else:
        sums = [grid.load(log_decay, dtype)]
        while sums[-1].shape[-2] > 1:
            first, second = _halves(sums[-1])
            sums.append(first + second)
    return [x.exp() for x in sums]


def _halves(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd blocks of (.., m, N); a constant (H, 1, N) is both."""
    if blocks.dim() == 3:
        return blocks, blocks
    pairs = blocks.unflatten(-2, (-1, 2))
    return pairs[..., 0, :], pairs[..., 1, :]


def _pairs(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves of blocks of 2·half tokens of a contiguous (n, B, H, L, N), each (n, B, H, m, half, N)."""
    blocks = x.unflatten(-2, (-1, 2, half))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -3)


def _rectangles(A: Tensor, half: int) -> Tensor:
    """View (m, n, B, H, half, half) of what second halves read of first halves in A (n, B, H, L, L)."""
    blocks = A.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=3, dim2=5).permute(0, 1, 2, 5, 3, 4)


class _Diagonal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(r, log_decay, k, v, u, state)
        grid = ChunkGrid(*v.shape, length)
        chunks, groups, size = grid.chunks, grid.groups, grid.size
        G = chunks * groups
        levels = _block_decays(grid, log_decay, dtype)
        rc, kc, vc = (grid.load(x, dtype) for x in (r, k, v))
        A = grid.empty(length, length, like=v, dtype=dtype).zero_()
        bonus = u.to(dtype)[:, None, :]
        A.diagonal(dim1=-2, dim2=-1).copy_((rc * kc * bonus).sum(-1))
        half = 1
        for decay in levels[:-1]:
            before, after = _halves(decay)
            k_first, r_second = _pairs(kc, half)[0], _pairs(rc, half)[1]
            rect = torch.bmm(_flat(r_second), _flat(k_first).mT)
            _rectangles(A, half).copy_(rect.view(*r_second.shape[:-1], half))
            r_second.mul_(before[..., None, :])
            k_first.mul_(after[..., None, :])
            half *= 2
        whole = levels[-1]
        S = v.new_empty(chunks + 1, groups, size, size, dtype=dtype)
        S[0] = 0 if state is None else state.reshape(groups, size, size)
        torch.bmm(vc.view(G, length, size).mT, kc.view(G, length, size), out=S[1:].view(G, size, size))
        across = whole.expand(chunks, grid.batch, grid.heads, 1, size).reshape(chunks, groups, 1, size)
        for i in range(chunks):
            S[i + 1].addcmul_(S[i], across[i])
        y = torch.bmm(A.view(G, length, length), vc.view(G, length, size))
        y.baddbmm_(rc.view(G, length, size), S[:-1].view(G, size, size).mT)
        ctx.save_for_backward(r, log_decay, k, v, u, A, S)
        ctx.grid, ctx.has_state = grid, state is not None
        ctx.set_materialize_grads(False)
        return grid.store(y, v.dtype), S[-1].view(grid.batch, grid.heads, size, size).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        r, log_decay, k, v, u, A, S = ctx.saved_tensors
        grid: ChunkGrid = ctx.grid
        chunks, groups, length, size = grid.chunks, grid.groups, grid.length, grid.size
        G = chunks * groups
        dtype = S.dtype
        levels = _block_decays(grid, log_decay, dtype)
        rc, kc, vc = (grid.load(x, dtype) for x in (r, k, v))
        dyc = torch.zeros_like(vc) if dy is None else grid.load(dy, dtype)
        kept, half = [], 1
        for decay in levels[:-1]:
            before, after = _halves(decay)
            k_first, r_second = _pairs(kc, half)[0], _pairs(rc, half)[1]
            kept.append((k_first.clone(), r_second.clone()))
            r_second.mul_(before[..., None, :])
            k_first.mul_(after[..., None, :])
            half *= 2
        rf, kf, vf, df = (x.view(G, length, size) for x in (rc, kc, vc, dyc))
        grads = S.new_empty(chunks + 1, groups, size, size)
        grads[-1] = 0 if dfinal is None else dfinal.reshape(groups, size, size)
        torch.bmm(df.mT, rf, out=grads[:-1].view(G, size, size))
        across = levels[-1].expand(chunks, grid.batch, grid.heads, 1, size).reshape(chunks, groups, 1, size)
        for i in reversed(range(chunks)):
            grads[i].addcmul_(grads[i + 1], across[i])
        Sf, Hf = S[:-1].view(G, size, size), grads[1:].view(G, size, size)
        colsum = (Sf * Hf).sum(1).view(chunks, grid.batch, grid.heads, 1, size)
        dlog = colsum * levels[-1]
        dA = torch.bmm(df, vf.mT)
        dv = torch.bmm(A.view(G, length, length).mT, df).baddbmm_(kf, Hf.mT)
        dr = torch.bmm(df, Sf).view(rc.shape)
        dk = torch.bmm(vf, Hf).view(rc.shape)
        dA = dA.view(A.shape)
        static = log_decay.dim() == 2
        if static:
            dlog = length * dlog.sum((0, 1))
        for (k_first, r_second), decay in zip(reversed(kept), reversed(levels[:-1]), strict=True):
            half //= 2
            before, after = _halves(decay)
            dk_first, dr_second = _pairs(dk, half)[0], _pairs(dr, half)[1]
            rect = _flat(_rectangles(dA, half).contiguous())
            dr_second.mul_(before[..., None, :])
            dk_first.mul_(after[..., None, :])
            from_r, from_k = (dr_second * r_second).sum(-2), (dk_first * k_first).sum(-2)
            _flat(dr_second).baddbmm_(rect, _flat(k_first))
            _flat(dk_first).baddbmm_(rect.mT, _flat(r_second))
            if static:
                dlog += half * (from_r + from_k).sum((0, 1, 3), keepdim=False)[:, None, :]
            else:
                dlog = torch.stack([dlog + from_r, dlog + from_k], -2).flatten(-3, -2)
        dlog = dlog[:, 0] if static else grid.store(dlog, log_decay.dtype)
        bonus = u.to(dtype)[:, None, :]
        q = dA.diagonal(dim1=-2, dim2=-1)[..., None]
        rr, kk = grid.load(r, dtype), grid.load(k, dtype)
        du = (q * rr * kk).sum((0, 1, 3))
        dr += q * (kk * bonus)
        dk += q * (rr * bonus)
        dstate = grads[0].view(grid.batch, grid.heads, size, size) if ctx.has_state else None
        return grid.store(dr, r.dtype), dlog, grid.store(dk, k.dtype), grid.store(dv, v.dtype), du, dstate, None
