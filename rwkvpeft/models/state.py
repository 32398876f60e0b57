"""The recurrent state of a model: all it remembers of the tokens it has read.

Letters: B batch, C channels, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class BlockState(NamedTuple):
    """What one block remembers. None stands for zeros.

    ``time_shift`` (B, C): the last normed input of the time mixing, or of ``ffnPre`` in its place. ``memory``
    (B, H, N, N) fp32: rows are value channels, columns key channels; of ``ffnPre`` there is none. ``channel_shift``
    (B, C): the channel mixing's last normed input.
    """

    time_shift: Tensor | None = None
    memory: Tensor | None = None
    channel_shift: Tensor | None = None


class RecurrentState(NamedTuple):
    """One ``BlockState`` per layer, first layer first."""

    blocks: tuple[BlockState, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> RecurrentState:
        """Apply ``change`` to every tensor."""
        return RecurrentState(
            tuple(
                BlockState(*(None if tensor is None else change(tensor) for tensor in block)) for block in self.blocks
            )
        )

    def detach(self) -> RecurrentState:
        """The same values, cut off from the graph that made them."""
        return self.map(Tensor.detach)

    def select(self, rows: Tensor) -> RecurrentState:
        """The state of some batch rows; ``rows`` is an int64 index vector, repeats allowed."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def memories(self) -> Tensor:
        """The memories of all layers that have a time mixing, (L, B, H, N, N).

        Raises: TypeError if a memory is still None, i.e. no token has been read.
        """
        return torch.stack([block.memory for block in self.blocks if block.memory is not None])


def fresh_state(n_layer: int) -> RecurrentState:
    """The state before the first token: zeros, held as None."""
    return RecurrentState((BlockState(),) * n_layer)
