"""One row of tokens, and rows put together. T is the length of a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Joining = Literal["equal", "alone", "padded", "packed"]
"""How rows share a batch: they are equally long; each is a batch alone; they are padded to the longest of them; or they
lie one behind another, as the documents within them do."""


class Row(NamedTuple):
    """One row: ``input_ids`` and ``labels`` (T,) int64, the label being the next token; ``weights`` (T,) fp32.

    ``lengths`` are the tokens of each document of a packed row; None where nothing tells documents apart. ``beside``
    are arrays by name that an objective wants beside the tokens; their first axis grows when rows are put one behind
    another.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    lengths: tuple[int, ...] | None = None
    beside: Mapping[str, NDArray[Any]] | None = None


def one_behind_another(rows: Sequence[Row]) -> Row:
    """One packed row of packed rows and of single documents."""
    return Row(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.labels for row in rows]),
        np.concatenate([row.weights for row in rows]),
        tuple(length for row in rows for length in row.lengths or (len(row.input_ids),)),
        together(rows, np.concatenate),
    )


def together(rows: Sequence[Row], join: Any) -> dict[str, NDArray[Any]] | None:
    """What lies beside the rows, each array joined with those of its name; None if nothing does."""
    if rows[0].beside is None:
        return None
    return {name: join([(row.beside or {})[name] for row in rows]) for name in rows[0].beside}


def apart(row: Row) -> Iterator[Row]:
    """The documents of a packed row, each as a row of its own."""
    start = 0
    for length in row.lengths or ():
        part = slice(start, start + length)
        yield Row(row.input_ids[part], row.labels[part], row.weights[part])
        start += length
