"""Several data sets in one run: which of them a position belongs to, and rows drawn that way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.data.report import DataReport, MixedPart
from rwkvpeft.data.row import Row
from rwkvpeft.data.rows import DocumentDataset, RowDataset, Sample

# finer shares than this are rounded, so that the products below stay within 64 bits
_FINEST = 10**6


class Mixture:
    """Spreads the parts over the positions as evenly as whole numbers allow; a pure function of the position.

    Of the first p positions, for every p, part i has its share of p but for less than the number of parts.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """Args: ``shares``: relative to each other, each above 0."""
        total = sum(shares)
        exact = [share / total for share in shares]
        unit = math.lcm(*(share.denominator for share in exact))
        unit = min(unit, _FINEST)
        self._shares = [max(1, round(share * unit)) for share in exact]

    def shares(self) -> list[float]:
        """The share of each part in all."""
        return [share / sum(self._shares) for share in self._shares]

    def place(self, position: int) -> tuple[int, int]:
        """The part a position belongs to, and how many positions before it do."""
        part, index = self.places(np.array([position], dtype=np.int64))
        return int(part[0]), int(index[0])

    def places(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``place`` of many positions."""
        parts = np.full(len(positions), len(self._shares) - 1)
        indices = positions.copy()
        open_ = np.arange(len(positions))
        rest = sum(self._shares)
        # each part takes its share of the positions that those before it have left
        for number, share in enumerate(self._shares[:-1]):
            left = indices[open_]
            before = _rounded_share(left, share, rest)
            taken = _rounded_share(left + 1, share, rest) > before
            parts[open_[taken]] = number
            indices[open_] = np.where(taken, before, left - before)
            open_ = open_[~taken]
            rest -= share
        return parts, indices

    def count(self, part: int, positions: int) -> int:
        """How many of the first ``positions`` belong to ``part``."""
        rest = sum(self._shares)
        for share in self._shares[:part]:
            positions -= int(_rounded_share(positions, share, rest))
            rest -= share
        return positions if part == len(self._shares) - 1 else int(_rounded_share(positions, self._shares[part], rest))

    def first_with(self, count: int) -> int:
        """The fewest positions of which ``count`` belong to part 0."""
        low, high = 0, (count + 1) * sum(self._shares) // self._shares[0] + 1
        while low < high:
            middle = (low + high) // 2
            if self.count(0, middle) < count:
                low = middle + 1
            else:
                high = middle
        return low


def _rounded_share(positions: NDArray[np.int64] | int, share: int, rest: int) -> NDArray[np.int64] | int:
    return (2 * positions * share + rest) // (2 * rest)


class MixedRows(RowDataset):
    """Rows of several data sets, each drawn in its own passes. One pass is over when the first part has been seen once.

    Args:
        parts: of one ``joining``.
        names: of the parts, for people.
    """

    def __init__(self, parts: Sequence[RowDataset], shares: Sequence[Fraction], names: Sequence[str]) -> None:
        super().__init__(parts[0].ctx_len)
        self.parts = parts
        self.joining = parts[0].joining
        self.tokenizer = parts[0].tokenizer
        self._names = names
        self._mixture = Mixture(shares)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def pass_rows(self) -> int:
        """See ``RowDataset``: until the first part has been seen once."""
        return self._mixture.first_with(self.parts[0].pass_rows)

    def row(self, index: int) -> Row:
        """Row ``index`` of the parts one behind another."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part].row(index - int(self._starts[part]))

    def draw(self, position: int) -> Sample:
        """The next row of the part that the position belongs to."""
        part, index = self._mixture.place(position)
        sample = self.parts[part].draw(index)
        return sample._replace(name=f"{sample.name} of {self._names[part]}")

    def labels(self, position: int) -> list[str]:
        """See ``RowDataset``."""
        part, index = self._mixture.place(position)
        return self.parts[part].labels(index)

    def replaced(self) -> list[str]:
        """See ``RowDataset``."""
        return [name for part in self.parts for name in part.replaced()]

    def report(self) -> DataReport:
        """The sums of the parts' counts, each part seen once, and how often each is seen in a pass."""
        reports = [part.report() for part in self.parts]
        n_drawn = self.pass_rows
        counts = [self._mixture.count(number, n_drawn) for number in range(len(reports))]
        mixed = [
            MixedPart(name, share, count / part.pass_rows)
            for name, share, count, part in zip(self._names, self._mixture.shares(), counts, self.parts, strict=True)
        ]
        return DataReport.of_all(reports, tuple(mixed))


class MixedDocuments(MixedRows, DocumentDataset):
    """``MixedRows`` whose rows are documents."""

    passes_are_alike = False

    def __init__(self, parts: Sequence[DocumentDataset], shares: Sequence[Fraction], names: Sequence[str]) -> None:
        """Args as ``MixedRows``."""
        super().__init__(parts, shares, names)
        self._documents = parts
        self.seed = parts[0].seed
        self.shuffle = parts[0].shuffle
        self.lengths = np.concatenate([part.lengths for part in parts])

    def label(self, index: int) -> str:
        """See ``DocumentDataset``."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._documents[part].label(index - int(self._starts[part]))

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See ``DocumentDataset``."""
        numbers, of_part = self._mixture.places(positions)
        drawn = np.empty_like(positions)
        for number, part in enumerate(self._documents):
            own = numbers == number
            drawn[own] = part.indices(of_part[own]) + int(self._starts[number])
        return drawn
