"""Sequences cut into chunks: the layout every chunked operator works in.

Letters: B batch, T tokens, H heads, N head size, n chunks, L tokens in a chunk, G = B·H. A chunked tensor is
(n, G, L, N): one chunk of all heads is one contiguous block, which is what the scan over chunks reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class ChunkGrid:
    """How a sequence of ``tokens`` is cut; the last chunk is filled up with zeros.

    Args:
        length: L.
    """

    batch: int
    tokens: int
    heads: int
    size: int
    length: int

    @classmethod
    def of(cls, sequence: Tensor, length: int) -> ChunkGrid:
        """The grid of a (B, T, H, N) in chunks of ``length`` tokens."""
        batch, tokens, heads, size = sequence.shape
        return cls(batch, tokens, heads, size, length)

    @property
    def chunks(self) -> int:
        """n, at least one: no tokens are a chunk of filling, which changes no state."""
        return max(1, -(-self.tokens // self.length))

    @property
    def groups(self) -> int:
        """G."""
        return self.batch * self.heads

    @property
    def matrices(self) -> int:
        """n·G, the chunks of all heads."""
        return self.chunks * self.groups

    @property
    def filling(self) -> int:
        """Tokens the last chunk lacks."""
        return self.chunks * self.length - self.tokens

    def view(self, sequence: Tensor) -> Tensor:
        """(B, T, H, N) of any strides as (n, B, H, L, N), without a copy unless the last chunk must be filled up."""
        if self.filling:
            sequence = functional.pad(sequence, (0, 0, 0, 0, 0, self.filling))
        return sequence.unflatten(1, (self.chunks, self.length)).permute(1, 0, 3, 2, 4)

    def empty(self, *parts: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for (n, B, H, *parts)."""
        return like.new_empty((self.chunks, self.batch, self.heads, *parts), dtype=dtype)

    def load(self, sequence: Tensor, dtype: torch.dtype) -> Tensor:
        """A chunked copy (n, B, H, L, N) of a sequence in ``dtype``."""
        return self.empty(self.length, self.size, like=sequence, dtype=dtype).copy_(self.view(sequence))

    def room(self, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """An empty (B, n·L, H, N), to be handed to ``trimmed`` when full, and its chunked view (n, B, H, L, N)."""
        whole = like.new_empty((self.batch, self.chunks * self.length, self.heads, self.size), dtype=dtype)
        return whole, whole.unflatten(1, (self.chunks, self.length)).permute(1, 0, 3, 2, 4)

    def trimmed(self, whole: Tensor) -> Tensor:
        """What ``room`` made, without the filling of the last chunk."""
        return whole[:, : self.tokens].contiguous() if self.filling else whole

    def store(self, chunked: Tensor, dtype: torch.dtype) -> Tensor:
        """A chunked tensor as a sequence (B, T, H, N)."""
        whole, view = self.room(chunked, dtype)
        view.copy_(chunked.view(view.shape))
        return self.trimmed(whole)
