"""The decays of ``diagonal.py``: the factors that one chunk's products need, and the gradient of ``w``.

Letters as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvpeft.ops.chunks import ChunkGrid

TILE = 8
LIMITS = {torch.float32: 18.0, torch.float64: 37.0}
"""e^-limit is below half a rounding step; e^(limit · TILE / 2) is far from overflow."""


def _borders(length: int, device: torch.device) -> Tensor:
    """Pairs (p, q) of every factor e^(E(p) - E(q)) a chunk needs, (factors, 2), in the order of ``Factors``."""
    starts = torch.arange(0, length, TILE, device=device)[:, None]
    middles = starts + TILE // 2
    tokens = starts + torch.arange(TILE + 1, device=device)
    first, last = torch.zeros_like(middles), torch.full_like(middles, length)
    pairs = [(tokens, middles.expand_as(tokens)), (middles, first), (last, middles)]
    half = TILE
    while half < length:
        border = middles // (2 * half) * (2 * half) + half
        pairs.append((torch.maximum(middles, border), torch.minimum(middles, border)))
        half *= 2
    pairs.append((last[:1], first[:1]))
    return torch.cat([torch.stack([p.flatten(), q.flatten()], 1) for p, q in pairs])


@dataclass(frozen=True)
class Factors:
    """Decay factors of a chunk's m tiles, leading dimensions (n, B, H), or (1, 1, H) when the decay never changes.

    Args:
        tile: e^(E(t) - mid) for t = 0..TILE of each tile, (.., m, TILE + 1, N).
        from_start: a tile's middle from the chunk's start, (.., m, 1, N).
        to_end: the chunk's end from a tile's middle, (.., m, 1, N).
        across: per half size, a tile's middle from the border or the border from it, (.., m, 1, N).
        whole: the whole chunk, (.., 1, N).
    """

    tile: Tensor
    from_start: Tensor
    to_end: Tensor
    across: list[Tensor]
    whole: Tensor

    @classmethod
    def of(cls, table: Tensor, length: int) -> Factors:
        """Name the parts of ``decay_table``'s result."""
        tiles = length // TILE
        in_tiles = tiles * (TILE + 1)
        tile, rest, whole = table.split([in_tiles, table.shape[-2] - in_tiles - 1, 1], dim=-2)
        from_start, to_end, *across = rest.unflatten(-2, (-1, tiles, 1)).unbind(-4)
        return cls(tile.unflatten(-2, (tiles, TILE + 1)), from_start, to_end, across, whole)


def decay_table(grid: ChunkGrid, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Minus the log decays (.., L, N), and e^(E(p) - E(q)) of ``_borders`` with the limited ones (.., borders, N)."""
    if w.dim() == 2:
        strength = torch.exp(w.to(dtype))[None, None, :, None, :].repeat(1, 1, 1, grid.length, 1)
    else:
        # filling must not decay the state
        strength = grid.load(w, dtype, filling=-math.inf).exp_()
    # far enough beyond the limit that its gradient is 0, without infinities
    strength.clamp_(max=5 * LIMITS[dtype])
    ends = _borders(grid.length, w.device)
    token = torch.arange(grid.length, device=w.device)
    sums = (token < ends[:, 1:]).to(dtype) - (token < ends[:, :1]).to(dtype)
    flat = strength.clamp(max=LIMITS[dtype]).flatten(0, 2)
    table = torch.bmm(sums.expand(flat.shape[0], -1, -1), flat).exp_()
    return strength, table.unflatten(0, strength.shape[:3])


def decay_grad(
    grid: ChunkGrid,
    strength: Tensor,
    operands: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    edges: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of ``w`` (B, T, H, N), from those of P and Q (n, B, H, m, TILE, N) without neighbours.

    ``edges`` (n, B, H, 1, N) is what passes the whole chunk less what stays inside it: dℓ_t sums the pairs t lies
    between, which are those whose reader is later plus those whose writer is earlier less, inside the chunk, all.
    """
    later = torch.ones(grid.length, grid.length, dtype=edges.dtype, device=edges.device).triu(1)
    weights = torch.cat([later, later.mT], 1).expand(grid.matrices, -1, -1)
    dlog = torch.bmm(weights, _pairs(operands, grads)).view(strength.shape)
    return grid.store(dlog.add_(edges).mul_(_slope(strength)).neg_(), dtype)


def constant_decay_grad(
    strength: Tensor, operands: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor], across: Tensor, inside: Tensor
) -> Tensor:
    """Gradient of ``w`` (H, N), from those of P and Q (n, B, H, m, TILE, N) through the states alone.

    Args:
        across: what passes the whole chunk, (n, B, H, 1, N).
        inside: gradient of P through A with every entry times the decays it holds, (n, B, H, m, TILE, N).
    """
    length = strength.shape[-2]
    token = torch.arange(length, device=strength.device, dtype=inside.dtype)
    passed = torch.cat([token, length - 1 - token]).expand(inside.shape[:3].numel(), 1, -1)
    dlog = torch.bmm(passed, _pairs(operands, grads)).view(across.shape).add_(across, alpha=length)
    dlog += torch.mul(operands[0], inside).sum((3, 4)).unsqueeze(3)
    return -(dlog.sum((0, 1)) * _slope(strength)[0, 0, :, :1])[:, 0]


def _pairs(operands: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor]) -> Tensor:
    """P ⊙ dP over Q ⊙ dQ, (n·G, 2L, N)."""
    first = operands[0]
    pairs = first.new_empty(*first.shape[:3], 2, *first.shape[3:])
    for part, operand, grad in zip(pairs.unbind(3), operands, grads, strict=True):
        torch.mul(operand, grad, out=part)
    return pairs.flatten(3, 5).flatten(0, 2)


def _slope(strength: Tensor) -> Tensor:
    """-dℓ/dw, less where ℓ was limited: every pair such a decay lies between holds e^-limit in its place."""
    return torch.rsub(strength, LIMITS[strength.dtype]).clamp_(max=0).exp_().mul_(strength)
