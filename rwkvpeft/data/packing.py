"""``--dataload pack``: rows that hold several whole documents, so that hardly any of a row is padding.

Letters: C tokens a row may hold, D documents, R rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.data.report import DataReport
from rwkvpeft.data.row import Joining, Row, one_behind_another
from rwkvpeft.data.rows import DocumentDataset, RowDataset, Sample
from rwkvpeft.data.sampling import mix, permute
from rwkvpeft.errors import ContractError

Numbers = NDArray[np.int64]

# packings that are kept: of the pass that is drawn, and of the next one, which a batch at its end begins
_KEPT = 2
# tokens that the operators in PyTorch work on at once
_CHUNK = 32


@dataclass(frozen=True)
class Packing:
    """Which documents share a row: row r holds ``documents[starts[r] : starts[r + 1]]``; ``starts`` is (R + 1,)."""

    documents: Numbers
    starts: Numbers

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> Numbers:
        """The documents of a row."""
        return self.documents[int(self.starts[index]) : int(self.starts[index + 1])]


def pack_in_order(lengths: NDArray[np.integer], capacity: int) -> Packing:
    """Fill row after row with the documents as they come.

    Args:
        lengths: (D,) tokens of each document, 1 to ``capacity``.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    _check(lengths, capacity)
    starts = [0]
    while starts[-1] < len(lengths):
        full = capacity + (int(ends[starts[-1] - 1]) if starts[-1] else 0)
        starts.append(int(np.searchsorted(ends, full, side="right")))
    return Packing(np.arange(len(lengths)), np.array(starts, dtype=np.int64))


def pack_tightly(lengths: NDArray[np.integer], capacity: int) -> Packing:
    """Best fit, the longest document first: each goes into the fullest row that still has room for it.

    Documents of one length are placed together, so that the time grows with the number of different lengths, not of
    documents. Rows and their documents' lengths depend on nothing but how many documents have which length; of
    documents of one length, the first ones come first. Source: for best fit decreasing, Johnson, Near-optimal bin
    packing algorithms, 1973; for working on counts, Krell et al., Efficient sequence packing without
    cross-contamination, 2021.

    Args:
        lengths: (D,) tokens of each document, 1 to ``capacity``.
    """
    _check(lengths, capacity)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    bins = _Bins(capacity)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        bins.place(size, count)
    firsts = dict(zip(sizes[::-1].tolist(), np.cumsum([0, *counts[::-1].tolist()]).tolist(), strict=False))
    rows: list[Numbers] = []
    starts = [np.zeros(1, dtype=np.int64)]
    for shape, number in bins.shapes():
        # (number, documents of a row): each column block takes its documents from those of its length, in order
        columns = []
        for size, times in shape:
            taken = order[firsts[size] : firsts[size] + number * times]
            firsts[size] += number * times
            columns.append(taken.reshape(number, times))
        filled = np.concatenate(columns, axis=1)
        rows.append(filled.ravel())
        starts.append(starts[-1][-1] + filled.shape[1] * np.arange(1, number + 1))
    return Packing(np.concatenate(rows) if rows else np.empty(0, dtype=np.int64), np.concatenate(starts))


def _check(lengths: NDArray[np.integer], capacity: int) -> None:
    if len(lengths) and not 0 < int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ContractError(f"documents of {lengths.min()} to {lengths.max()} tokens in rows of {capacity}")


class _Shape(NamedTuple):
    """What rows of one kind hold: ``times`` documents of ``size`` tokens, and what ``rest`` says."""

    size: int
    times: int
    rest: _Shape | None


class _Bins:
    """Rows being filled, those of one content counted together."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # by the room that is left: what such rows hold, and how many there are of each
        self._open: dict[int, list[tuple[_Shape, int]]] = {}
        self._rooms: list[int] = []
        self._full: list[tuple[_Shape, int]] = []

    def place(self, size: int, count: int) -> None:
        """Put ``count`` documents of ``size`` tokens into the fullest rows they fit in, then into new ones."""
        while count:
            place = bisect_left(self._rooms, size)
            if place == len(self._rooms):
                self._split(self._capacity, None, count, size, count)
                return
            room = self._rooms[place]
            kind = self._open[room]
            shape, number = kind.pop()
            if not kind:
                del self._open[room], self._rooms[place]
            count -= self._split(room, shape, number, size, count)

    def shapes(self) -> Iterator[tuple[list[tuple[int, int]], int]]:
        """What rows hold, as sizes and how many documents of each, and how many rows hold that."""
        kinds = [*self._full, *(kind for room in self._rooms for kind in self._open[room])]
        for shape, number in kinds:
            parts: list[tuple[int, int]] = []
            link: _Shape | None = shape
            while link is not None:
                parts.append((link.size, link.times))
                link = link.rest
            yield parts[::-1], number

    def _split(self, room: int, shape: _Shape | None, number: int, size: int, count: int) -> int:
        """Fill ``number`` rows of one kind with up to ``count`` documents, as many as fit into each. Returns: how many
        were placed."""
        times = room // size
        filled, over = divmod(min(count, number * times), times)
        self._keep(room - times * size, _Shape(size, times, shape), filled)
        if over:
            self._keep(room - over * size, _Shape(size, over, shape), 1)
        if shape is not None:
            self._keep(room, shape, number - filled - (over > 0))
        return filled * times + over

    def _keep(self, room: int, shape: _Shape, number: int) -> None:
        if not number:
            return
        if not room:
            self._full.append((shape, number))
            return
        if room not in self._open:
            self._open[room] = []
            insort(self._rooms, room)
        self._open[room].append((shape, number))


class PackedRows(RowDataset):
    """Rows that each hold whole documents, whose inputs together are at most ctx_len tokens.

    Each pass over the documents is packed anew: with ``shuffle`` tightly, documents of one length changing places, and
    rows come in a seeded order; without, documents and rows stay in the file's order.

    Args:
        documents: not padded.
    """

    joining: Joining = "packed"

    def __init__(self, documents: DocumentDataset, *, seed: int, shuffle: bool) -> None:
        super().__init__(documents.ctx_len)
        self.documents = documents
        self.tokenizer = documents.tokenizer
        self._seed = seed
        self._shuffle = shuffle
        self._kept: dict[int, Packing] = {}
        # where the rows of each pass end, as far as known
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._all)

    @property
    def pass_rows(self) -> int:
        """See ``RowDataset``."""
        return self._first_pass

    @property
    def longest_row(self) -> int:
        """See ``RowDataset``."""
        filled = np.add.reduceat(self.documents.lengths[self._all.documents], self._all.starts[:-1])
        return int(filled.max())

    @property
    def crowded_row(self) -> tuple[int, ...]:
        """Documents fill whole chunks of an operator, so that many short ones take more than a long one."""
        lengths = self.documents.lengths[self._all.documents].astype(np.int64)
        filled = np.add.reduceat(-(-lengths // _CHUNK) * _CHUNK, self._all.starts[:-1])
        return tuple(self.documents.lengths[self._all.row(int(filled.argmax()))].tolist())

    def row(self, index: int) -> Row:
        """Row ``index`` of those that hold all documents once, tightly."""
        return self._join(self._all.row(index))

    def draw(self, position: int) -> Sample:
        """Each pass has its own packing and its own order of rows."""
        documents = self._drawn(position)
        row = self._join(documents)
        return Sample(row, f"{len(documents)} documents", len(row.input_ids) + len(documents), is_cut=False)

    def labels(self, position: int) -> list[str]:
        """See ``RowDataset``."""
        return [self.documents.label(int(document)) for document in self._drawn(position)]

    def replaced(self) -> list[str]:
        """See ``RowDataset``."""
        return self.documents.replaced()

    def report(self) -> DataReport:
        """That of the documents, and how they fill the rows of the first pass."""
        found = self.documents.report()
        packing = self._packing(0)
        tokens = int(self.documents.lengths[packing.documents].sum(dtype=np.int64))
        return replace(found, rows=len(packing), packed_documents=len(packing.documents), packed_tokens=tokens)

    @cached_property
    def _first_pass(self) -> int:
        return len(self._packing(0))

    @cached_property
    def _all(self) -> Packing:
        return pack_tightly(self.documents.lengths, self.ctx_len)

    def _drawn(self, position: int) -> Numbers:
        """The documents of the row at a position."""
        passed, index = self._place(position)
        packing = self._packing(passed)
        if self._shuffle:
            index = permute(index, len(packing), mix(self._seed, passed, 1))
        return packing.row(index)

    def _place(self, position: int) -> tuple[int, int]:
        """The pass that a position lies in, and the number of the position there."""
        if self.documents.passes_are_alike:
            return divmod(position, self.pass_rows)
        # a mixture draws other documents of its smaller shares in each pass, which take more rows or fewer
        while not self._ends or self._ends[-1] <= position:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._packing(len(self._ends))))
        passed = bisect_left(self._ends, position + 1)
        return passed, position - (self._ends[passed - 1] if passed else 0)

    def _packing(self, passed: int) -> Packing:
        if passed not in self._kept:
            while len(self._kept) >= _KEPT:
                del self._kept[min(self._kept)]
            self._kept[passed] = self._pack(passed)
        return self._kept[passed]

    def _pack(self, passed: int) -> Packing:
        n = self.documents.pass_rows
        drawn = self.documents.indices(np.arange(passed * n, (passed + 1) * n, dtype=np.int64))
        pack = pack_tightly if self._shuffle else pack_in_order
        packing = pack(self.documents.lengths[drawn], self.ctx_len)
        return replace(packing, documents=drawn[packing.documents])

    def _join(self, documents: Numbers) -> Row:
        return one_behind_another([self.documents.row(int(document)) for document in documents])
