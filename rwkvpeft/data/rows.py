"""Rows of tokens, cut from documents or from the whole stream. T is the length of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.data.collate import Collator
from rwkvpeft.data.report import DataReport
from rwkvpeft.data.row import Joining, Row
from rwkvpeft.data.rules import MaskRule
from rwkvpeft.data.sampling import magic_prime_window, random_start, sample_index, sample_indices
from rwkvpeft.data.source import TokenSource

# more is not read before training starts, which would take minutes
SCANNED_DOCUMENTS = 200_000
SCANNED_TOKENS = 100_000_000

_ATTEMPTS = 1000

class Sample(NamedTuple):
    """A row as a run draws it.

    ``name`` says what it is, for people; ``length`` tokens of it are data, the first of them no target, and the rest
    padding; ``is_cut`` if the end of its document did not fit.
    """

    row: Row
    name: str
    length: int
    is_cut: bool


class RowDataset(ABC):
    """Rows of one pass, and the order in which a run draws them.

    Attributes:
        ctx_len: tokens in a row, or the most a row may have.
        joining: how rows share a batch.
        collator: makes batches of the rows, where these are more than tokens to be predicted; None for those.
        tokenizer: name of the tokenizer that made the tokens.
    """

    joining: Joining = "equal"
    collator: Collator | None = None
    tokenizer = "world"

    def __init__(self, ctx_len: int) -> None:
        self.ctx_len = ctx_len

    @abstractmethod
    def __len__(self) -> int:
        """Rows that hold something to train."""

    @property
    def pass_rows(self) -> int:
        """Rows that a run draws in its first pass over the data."""
        return len(self)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row."""
        return self.ctx_len

    @property
    def crowded_row(self) -> tuple[int, ...]:
        """Tokens of each document of the packed row that takes most to work through; empty where rows are not packed.
        """
        return ()

    @abstractmethod
    def row(self, index: int) -> Row:
        """Row ``index`` of all in the file's order."""

    @abstractmethod
    def draw(self, position: int) -> Sample:
        """What a run draws at a position, which counts rows over all ranks; a pure function."""

    def sample(self, position: int) -> Row:
        """The row that a run draws at a position."""
        return self.draw(position).row

    @abstractmethod
    def labels(self, position: int) -> list[str]:
        """What people find the documents by that a run draws at a position."""

    @abstractmethod
    def replaced(self) -> list[str]:
        """Names of the files in whose place others have been put since they were opened."""

    @abstractmethod
    def report(self) -> DataReport:
        """Counts of the data and of what is trained in one pass."""


class DocumentDataset(RowDataset):
    """Rows each of which is a document, in an order that can be told for many positions at once.

    Attributes:
        lengths: (len,) inputs of each row, its padding not counted.
        seed: of the order.
        shuffle: whether the order is a seeded one and not the file's.
        passes_are_alike: whether each pass holds every row once.
    """

    lengths: NDArray[np.integer]
    seed: int
    shuffle: bool
    passes_are_alike = True

    @property
    def longest_row(self) -> int:
        """See ``RowDataset``."""
        return self.ctx_len if self.joining == "equal" else int(self.lengths.max())

    @abstractmethod
    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows that a run draws at these positions: ``row`` of them gives what ``sample`` gives."""

    @abstractmethod
    def label(self, index: int) -> str:
        """What people find the document of row ``index`` by."""

    def labels(self, position: int) -> list[str]:
        """See ``RowDataset``."""
        return [self.label(int(self.indices(np.array([position], dtype=np.int64))[0]))]


class DocumentRows(DocumentDataset):
    """A row is a document, cut to ctx_len + 1 tokens.

    If rows are to be ``equal``, all have ctx_len tokens: behind a short document the stream goes on, with weight 0. A
    document without a trained token is left out; ``SCANNED_DOCUMENTS`` and ``SCANNED_TOKENS`` bound how far they are
    looked for.

    Attributes:
        beside: gives what lies beside a row: takes the number of its document in ``source``, the inputs that are of
            the document, and how long the row is; None for nothing.
    """

    beside: Callable[[int, NDArray[np.int64], int], Mapping[str, NDArray[Any]]] | None = None

    def __init__(
        self, source: TokenSource, rule: MaskRule, ctx_len: int, *, seed: int, shuffle: bool, joining: Joining
    ) -> None:
        super().__init__(ctx_len)
        self.source = source
        self.rule = rule
        self.joining = joining
        self.seed = seed
        self.shuffle = shuffle
        sizes = np.minimum(source.sizes, ctx_len + 1)
        self._scanned, trained = _count_trained(source, rule, sizes)
        self._trained_tokens = int(trained[: self._scanned].sum())
        # beyond what was scanned a document counts as trained if it has a target at all
        self._documents = np.flatnonzero(trained > 0)
        self.lengths = sizes[self._documents] - 1

    def __len__(self) -> int:
        return len(self._documents)

    def row(self, index: int) -> Row:
        """Document number ``index`` of those with something to train."""
        document = int(self._documents[index])
        length = min(int(self.source.sizes[document]), self.ctx_len + 1)
        tokens = self._continued(document) if self.joining == "equal" else self.source.read(document, length)
        weights = np.zeros(len(tokens) - 1, dtype=np.float32)
        weights[: length - 1] = self.rule.weights(self.source, document, length)[1:]
        row = _row(tokens, weights)
        if self.beside is None:
            return row
        return row._replace(beside=self.beside(document, row.input_ids[: length - 1], len(row.input_ids)))

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See ``DocumentDataset``."""
        return sample_indices(positions, len(self), self.seed, self.shuffle)

    def label(self, index: int) -> str:
        """See ``DocumentDataset``."""
        return self.source.label(int(self._documents[index]))

    def replaced(self) -> list[str]:
        """See ``RowDataset``."""
        return [self.source.name] if self.source.is_replaced() else []

    def draw(self, position: int) -> Sample:
        """Each pass over the documents has its own order."""
        index = sample_index(position, len(self), self.seed, self.shuffle)
        document = int(self._documents[index])
        size = int(self.source.sizes[document])
        longest = self.ctx_len + 1
        return Sample(self.row(index), f"document {document}", min(size, longest), size > longest)

    def report(self) -> DataReport:
        """Counts; those of trained tokens and rows are of the scanned documents."""
        sizes = self.source.sizes
        return DataReport(
            documents=len(sizes),
            tokens=self.source.n_tokens,
            longest=int(sizes.max(initial=0)),
            rows=len(self),
            ctx_len=self.ctx_len,
            notes=self.source.notes,
            trained_tokens=self._trained_tokens,
            cut_endings=int((sizes > self.ctx_len + 1).sum()),
            empty_rows=len(sizes) - len(self),
            scanned_documents=self._scanned,
            padding=int((self.ctx_len - self.lengths).sum(dtype=np.int64)) if self.joining == "equal" else 0,
        )

    def _continued(self, document: int) -> NDArray[np.integer]:
        """ctx_len + 1 tokens from the document's start; where the file ends first, document 0 follows the document."""
        start, length = int(self.source.starts[document]), self.ctx_len + 1
        if start + length <= self.source.n_tokens:
            return self.source.tokens(start, length)
        tokens = self.source.read(document, length)
        # a file shorter than a row is repeated
        beginning = self.source.tokens(0, min(length, self.source.n_tokens))
        return np.concatenate([tokens, np.resize(beginning, max(0, length - len(tokens)))])[:length]


class WindowRows(RowDataset):
    """``get``: a row is ctx_len tokens of the whole stream, wherever documents end.

    Order: RWKV-LM's if a magic prime is given; otherwise windows that start anywhere, or with ``shuffle`` off
    those of the file one after the other.
    """

    def __init__(
        self, source: TokenSource, rule: MaskRule, ctx_len: int, *, seed: int, shuffle: bool, magic_prime: int
    ) -> None:
        super().__init__(ctx_len)
        self.source = source
        self.rule = rule
        self._seed = seed
        self._shuffle = shuffle
        self._magic_prime = magic_prime
        n_windows = (source.n_tokens - 1) // ctx_len
        if rule.trains_everything:
            self._mask: NDArray[np.uint8] | NDArray[np.float32] | None = None
            self._windows = np.arange(n_windows)
            self._trained_tokens = n_windows * ctx_len
        else:
            self._mask = _stream_mask(source, rule)
            targets = self._mask[1 : 1 + n_windows * ctx_len].reshape(n_windows, ctx_len)
            trained = np.count_nonzero(targets, axis=1)
            self._windows = np.flatnonzero(trained)
            self._trained_tokens = int(trained.sum())
        self._empty = n_windows - len(self._windows)

    def __len__(self) -> int:
        return len(self._windows)

    def row(self, index: int) -> Row:
        """Window number ``index`` of those with something to train, in the file's order."""
        return self._at(int(self._windows[index]) * self.ctx_len)

    def draw(self, position: int) -> Sample:
        """The window at a position in the order of the class. None is cut: another goes on where it ends."""
        start = self._start(position)
        return Sample(self._at(start), f"window from token {start}", self.ctx_len + 1, is_cut=False)

    def labels(self, position: int) -> list[str]:
        """See ``RowDataset``: the window, and the documents it touches."""
        start = self._start(position)
        end = start + self.ctx_len + 1
        starts = self.source.starts
        touched = np.flatnonzero((starts < end) & (starts + self.source.sizes > start))
        which = f"{touched[0]}" if len(touched) == 1 else f"{touched[0]} to {touched[-1]}"
        return [f"{self.source.name}, tokens {start} to {end - 1}, document {which}"]

    def replaced(self) -> list[str]:
        """See ``RowDataset``."""
        return [self.source.name] if self.source.is_replaced() else []

    def report(self) -> DataReport:
        """Counts of the windows that follow each other without a gap."""
        sizes = self.source.sizes
        return DataReport(
            documents=len(sizes),
            tokens=self.source.n_tokens,
            longest=int(sizes.max(initial=0)),
            rows=len(self),
            ctx_len=self.ctx_len,
            notes=self.source.notes,
            trained_tokens=self._trained_tokens,
            cut_endings=0,
            empty_rows=self._empty,
            scanned_documents=len(sizes),
        )

    def _start(self, position: int) -> int:
        if self._magic_prime:
            return magic_prime_window(position, self._magic_prime) * self.ctx_len
        if self._shuffle:
            last = self.source.n_tokens - self.ctx_len - 1
            for attempt in range(_ATTEMPTS):
                start = random_start(position, last, self._seed, attempt)
                if self._mask is None or self._mask[start + 1 : start + 1 + self.ctx_len].any():
                    return start
        # where answers are that rare, the windows that have any are drawn in turn
        index = sample_index(position, len(self), self._seed, self._shuffle)
        return int(self._windows[index]) * self.ctx_len

    def _at(self, start: int) -> Row:
        tokens = self.source.tokens(start, self.ctx_len + 1)
        if self._mask is None:
            return _row(tokens, np.ones(self.ctx_len, dtype=np.float32))
        return _row(tokens, self._mask[start + 1 : start + 1 + self.ctx_len].astype(np.float32))


def _row(tokens: NDArray[np.integer], weights: NDArray[np.float32]) -> Row:
    return Row(tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64), weights)


def _count_trained(
    source: TokenSource, rule: MaskRule, sizes: NDArray[np.integer]
) -> tuple[int, NDArray[np.integer]]:
    """How many documents were scanned, and for each document its trained tokens, or its targets where not scanned.

    ``sizes`` are the documents' lengths after the cut.
    """
    trained = np.maximum(sizes - 1, 0)
    if rule.trains_everything:
        return len(sizes), trained
    total = np.cumsum(sizes, dtype=np.int64)
    scanned = min(len(sizes), SCANNED_DOCUMENTS, int(np.searchsorted(total, SCANNED_TOKENS)) + 1)
    trained[:scanned] = rule.count(source, sizes[:scanned].tolist())
    return scanned, trained


def _stream_mask(source: TokenSource, rule: MaskRule) -> NDArray[np.uint8] | NDArray[np.float32]:
    """(n_tokens,) the weight of each token of the stream; a byte each where they are all 0 or 1."""
    mask: NDArray[np.uint8] | NDArray[np.float32] = np.zeros(source.n_tokens, dtype=np.uint8)
    for document in range(len(source)):
        start, size = int(source.starts[document]), int(source.sizes[document])
        weights = rule.weights(source, document, size)
        if mask.dtype == np.uint8 and not np.isin(weights, (0, 1)).all():
            mask = mask.astype(np.float32)
        mask[start : start + size] = weights
    return mask
