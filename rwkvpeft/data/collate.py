"""Rows put together into a batch: where they differ in length, in what they weigh, or hold more than tokens.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rwkvpeft.data.batches import Batch, TokenBatch
from rwkvpeft.data.row import Joining, Row, one_behind_another, together
from rwkvpeft.ops.sequences import Sequences

Weight = float | NDArray[np.float64]
"""What losses of several batches are averaged by; an array where a loss has several means, the first for figures."""


class Collator(Protocol):
    """Makes batches of rows. ``join`` and ``weigh`` run in data workers, ``batch`` in the training process."""

    def weigh(self, rows: Sequence[Row]) -> Weight:
        """What the rows of a batch weigh; that of a step is the sum over its batches."""
        ...

    def join(self, rows: Sequence[Row]) -> Row:
        """The rows of a batch as one."""
        ...

    def batch(self, joined: Row, step_weight: Weight) -> Batch:
        """The batch of joined rows; ``step_weight`` is that of all batches of the optimizer step on this rank."""
        ...


class TokenCollator:
    """Rows of tokens to be predicted, each of which counts by its own weight."""

    def __init__(self, joining: Joining) -> None:
        self.joining = joining

    def weigh(self, rows: Sequence[Row]) -> Weight:
        """The sum of the weights of all tokens."""
        return sum(float(row.weights.sum(dtype=np.float64)) for row in rows)

    def join(self, rows: Sequence[Row]) -> Row:
        """The rows as one of arrays (B, T), or (1, T) if they are packed."""
        if self.joining == "packed":
            row = one_behind_another(rows)
            beside = row.beside and {name: array[None] for name, array in row.beside.items()}
            return Row(row.input_ids[None], row.labels[None], row.weights[None], row.lengths, beside)
        if self.joining == "padded":
            longest = max(len(row.input_ids) for row in rows)
            rows = [_padded(row, longest - len(row.input_ids)) for row in rows]
        return Row(
            np.stack([row.input_ids for row in rows]),
            np.stack([row.labels for row in rows]),
            np.stack([row.weights for row in rows]),
            beside=together(rows, np.stack),
        )

    def batch(self, joined: Row, step_weight: Weight) -> Batch:
        """A ``TokenBatch``. What lies beside the rows is for the collators of those who put it there."""
        return token_batch(joined, step_weight)


def token_batch(joined: Row, step_weight: Weight) -> TokenBatch:
    """The tokens of joined rows."""
    input_ids, labels, weights = (torch.from_numpy(array) for array in joined[:3])
    sequences = None if joined.lengths is None else Sequences(joined.lengths)
    return TokenBatch(input_ids, labels, weights, torch.as_tensor(step_weight, dtype=torch.float64), sequences)


def collator_of(dataset: Any) -> Collator:
    """What makes batches of a dataset's rows."""
    own: Collator | None = dataset.collator
    return own or TokenCollator(dataset.joining)


def _padded(row: Row, padding: int) -> Row:
    """The row with so many tokens of weight 0 behind it."""

    def longer(array: NDArray[Any]) -> NDArray[Any]:
        return np.pad(array, ((0, padding), *((0, 0),) * (array.ndim - 1)))

    beside = row.beside and {name: longer(array) for name, array in row.beside.items()}
    return Row(longer(row.input_ids), longer(row.labels), longer(row.weights), beside=beside)
