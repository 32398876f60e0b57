"""Sequences cut into chunks: the layout every chunked operator works in.

Letters: B batch, T tokens, H heads, N head size, n chunks, L tokens in a chunk, G = B·H. A chunked tensor is
(n, G, L, N): one chunk of all heads is one contiguous block, which is what the scan over chunks reads. States are
(n + F, G, N, N): the one each chunk starts from, then what the F sequences of a head leave behind.

The rows of a batch are scanned together, as heads are: F is 1. Of a packed row (B = 1) chunks stand as
``Sequences.side_by_side`` orders them, and F is the number of sequences that have tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rwkvpeft.ops.sequences import Sequences, SideBySide


@dataclass(frozen=True)
class ChunkGrid:
    """How a batch of ``tokens`` is cut; chunks that end early are filled up.

    Args:
        length: L.
        packing: of a packed row.
    """

    batch: int
    tokens: int
    heads: int
    size: int
    length: int
    packing: SideBySide | None = None

    @classmethod
    def of(cls, row: Tensor, length: int, counts: Sequence[int] = (), tables: Sequence[Tensor] = ()) -> ChunkGrid:
        """The grid of a (B, T, H, N) in chunks of ``length`` tokens; of a packed row with its ``SideBySide``."""
        batch, tokens, heads, size = row.shape
        packing = SideBySide(tuple(counts), *tables) if tables else None
        return cls(batch, tokens, heads, size, length, packing)

    @property
    def chunks(self) -> int:
        """n, at least one: no tokens are a chunk of filling, which changes no state."""
        if self.packing is not None:
            return sum(self.packing.counts)
        return max(1, -(-self.tokens // self.length))

    @property
    def starts(self) -> int:
        """F, the first so many of the chunks begin a sequence."""
        return 1 if self.packing is None else self.packing.counts[0]

    @property
    def groups(self) -> int:
        """G."""
        return self.batch * self.heads

    @property
    def matrices(self) -> int:
        """n·G, the chunks of all heads."""
        return self.chunks * self.groups

    @property
    def after(self) -> slice | Tensor:
        """Where among the states stands the one that each chunk leaves."""
        return slice(1, None) if self.packing is None else self.packing.after

    def scan(self) -> list[tuple[slice, slice]]:
        """Steps of the scan, as matrices: which chunks' starting states are known, and where those they leave stand."""
        groups, chunks = self.groups, self.chunks
        if self.packing is None:
            starts = range(0, chunks * groups, groups)
            return [(slice(i, i + groups), slice(i + groups, i + 2 * groups)) for i in starts]
        steps, here = [], 0
        counts = self.packing.counts
        for count, more in zip(counts, (*counts[1:], 0), strict=True):
            # the first ones go on, the others end here
            for first, last, there in ((0, more, here + count), (more, count, chunks)):
                if first < last:
                    parts = [slice((at + first) * groups, (at + last) * groups) for at in (here, there)]
                    steps.append((parts[0], parts[1]))
            here += count
        return steps

    def entering(self, state: Tensor) -> Tensor:
        """States (B, H, N, N), of a packed row (S, H, N, N), as those that sequences start from, (F, G, N, N)."""
        if self.packing is None:
            return state.reshape(1, self.groups, self.size, self.size)
        return state.index_select(0, self.packing.order[: self.starts])

    def leaving(self, ends: Tensor, before: Tensor | None) -> Tensor:
        """States (F, G, N, N) as a copy shaped as ``entering`` takes them; sequences without tokens keep ``before``."""
        if self.packing is None:
            return ends.reshape(self.batch, self.heads, self.size, self.size).clone()
        order = self.packing.order
        sizes = (len(order), self.heads, self.size, self.size)
        states = ends.new_zeros(sizes) if before is None else before.to(ends.dtype).expand(sizes).clone()
        return states.index_copy_(0, order[: self.starts], ends)

    def left(self, states: Tensor) -> Tensor:
        """Room for what each chunk adds to the states, (n, G, N, N): where the sum will stand, if that is one place."""
        return states[1:] if self.packing is None else torch.empty_like(states[: self.chunks])

    def view(self, row: Tensor, filling: float = 0.0) -> Tensor:
        """(B, T, H, N) of any strides as (n, B, H, L, N), without a copy unless chunks must be filled up."""
        lacking = self.chunks * self.length - self.tokens
        if self.packing is not None:
            more = row.new_full((1, 1, self.heads, self.size), filling)
            row = torch.cat((row, more), 1).index_select(1, self.packing.slots)
        elif lacking:
            row = pad(row, (0, 0, 0, 0, 0, lacking), value=filling)
        return row.unflatten(1, (self.chunks, self.length)).permute(1, 0, 3, 2, 4)

    def empty(self, *parts: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for (n, B, H, *parts)."""
        return like.new_empty((self.chunks, self.batch, self.heads, *parts), dtype=dtype)

    def load(self, row: Tensor, dtype: torch.dtype, filling: float = 0.0) -> Tensor:
        """A chunked copy (n, B, H, L, N) of (B, T, H, N) in ``dtype``."""
        return self.empty(self.length, self.size, like=row, dtype=dtype).copy_(self.view(row, filling))

    def room(self, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """An empty (B, n·L, H, N), to be handed to ``trimmed`` when full, and its chunked view (n, B, H, L, N)."""
        whole = like.new_empty((self.batch, self.chunks * self.length, self.heads, self.size), dtype=dtype)
        return whole, whole.unflatten(1, (self.chunks, self.length)).permute(1, 0, 3, 2, 4)

    def trimmed(self, whole: Tensor) -> Tensor:
        """What ``room`` made, as (B, T, H, N), without filling."""
        if self.packing is not None:
            return whole.index_select(1, self.packing.places)
        return whole[:, : self.tokens].contiguous() if whole.shape[1] > self.tokens else whole

    def store(self, chunked: Tensor, dtype: torch.dtype) -> Tensor:
        """A chunked tensor as (B, T, H, N)."""
        whole, view = self.room(chunked, dtype)
        view.copy_(chunked.view(view.shape))
        return self.trimmed(whole)


def cut(
    sequences: Sequences | None, length: int, device: torch.device
) -> tuple[int, tuple[int, ...], tuple[Tensor, ...]]:
    """What ``ChunkGrid.of`` takes beside the row: ``length``; counts and tables, empty unless it is packed."""
    if sequences is None:
        return length, (), ()
    counts, *tables = sequences.side_by_side(length, device)
    return length, counts, tuple(tables)
