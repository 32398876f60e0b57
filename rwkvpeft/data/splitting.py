"""Documents that are held out from training: which they are, and sources of these and of the others."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.data.sampling import mix, permute_many
from rwkvpeft.data.source import Tokens, TokenSource
from rwkvpeft.data.voices import Spoken
from rwkvpeft.errors import ContractError, UserError

# tokens at either end of a document that are compared first
_COMPARED = 32


class DocumentsOf(TokenSource):
    """Some documents of a source, as a source of its own; its stream is theirs alone, end to end, and never copied.

    ``stream`` is that of the whole source, for its type; what is read goes through ``read`` and ``tokens``.
    """

    def __init__(
        self, source: TokenSource, documents: NDArray[np.int64], name: str, notes: tuple[str, ...] = ()
    ) -> None:
        """Args: ``documents``: their numbers in ``source``, ascending; ``name``: for messages; ``notes``: beside those
        of ``source``."""
        self.name = name
        self.notes = (*source.notes, *notes)
        self._own_notes = notes
        self.source = source
        self.documents = documents
        self.stream = source.stream
        self.sizes = source.sizes[documents]
        ends = np.cumsum(self.sizes, dtype=np.int64)
        self.starts = ends - self.sizes

    @property
    def n_tokens(self) -> int:
        """Tokens of these documents."""
        return int(self.starts[-1] + self.sizes[-1]) if len(self) else 0

    def read(self, index: int, most: int = sys.maxsize) -> Tokens:
        """See ``TokenSource``; ``index`` counts these documents."""
        return self.source.read(int(self.documents[index]), most)

    def label(self, index: int) -> str:
        """See ``TokenSource``: as in the whole source."""
        return self.source.label(int(self.documents[index]))

    def is_replaced(self) -> bool:
        """See ``TokenSource``."""
        return self.source.is_replaced()

    def spoken(self, index: int) -> Spoken | None:
        """See ``TokenSource``; ``index`` counts these documents."""
        return self.source.spoken(int(self.documents[index]))

    def tokens(self, start: int, length: int) -> Tokens:
        """See ``TokenSource``: tokens of these documents' own stream."""
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise ContractError(f"tokens {start} to {start + length} of a stream of {self.n_tokens}")
        if length == 0:
            return self.stream[:0]
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, start + length, side="left"))
        read = np.concatenate([self.read(index) for index in range(first, last)])
        offset = start - int(self.starts[first])
        return read[offset : offset + length]

    def check(self, vocab_size: int) -> None:
        """See ``TokenSource``: all documents of the whole source are compared."""
        self.source.check(vocab_size)

    def __reduce__(self) -> tuple[type[DocumentsOf], tuple[TokenSource, NDArray[np.int64], str, tuple[str, ...]]]:
        # the stream would be pickled as it lies in the file
        return DocumentsOf, (self.source, self.documents, self.name, self._own_notes)


def split_source(source: TokenSource, share: float, seed: int) -> tuple[DocumentsOf, DocumentsOf]:
    """Part a source's documents into those to train on and those held out; no document is in both.

    Documents of one kin stay together, so that a few more may be held out than were asked for.

    Args:
        share: below 1 the share of the documents that is held out, otherwise their number.
        seed: of the choice, which depends on nothing else but the number of documents and their kin.
    Raises: UserError if one of the two would be empty.
    """
    n = len(source)
    n_held_out = held_out_count(n, share)
    if not 0 < n_held_out < n:
        raise UserError(
            f"--val_split {share:g} cannot be taken from {source.name}",
            found=f"{n} document{'' if n == 1 else 's'}",
            expected="at least one document on either side",
            fix="--val_data_file with held-out data" if n < 2 else f"--val_split 1 to {n - 1}, or a share below 1",
        )
    is_held_out = _held_out(source.kin(), n, n_held_out, mix(seed, n))
    if is_held_out.all():
        raise UserError(
            f"--val_split {share:g} leaves nothing of {source.name}: records with one prompt stay together",
            found=f"{n} records",
            fix="fewer held out, or --val_data_file with held-out data",
        )
    return (
        DocumentsOf(source, np.flatnonzero(~is_held_out), f"what is not held out of {source.name}"),
        DocumentsOf(source, np.flatnonzero(is_held_out), f"what is held out of {source.name}"),
    )


def _held_out(kin: NDArray[np.int64] | None, n: int, count: int, key: int) -> NDArray[np.bool_]:
    """(n,) which documents are held out: so many in a fixed order, and their kin; no more kin than are needed."""
    chosen = np.zeros(n, dtype=bool)
    if kin is None:
        chosen[permute_many(np.arange(count), n, key)] = True
        return chosen
    ordered = kin[permute_many(np.arange(n), n, key)]
    found, first, sizes = np.unique(ordered, return_index=True, return_counts=True)
    in_order = np.argsort(first)
    needed = int(np.searchsorted(np.cumsum(sizes[in_order]), count)) + 1
    return np.isin(kin, found[in_order[:needed]])


def without_copies(source: TokenSource, held_out: Sequence[TokenSource]) -> TokenSource:
    """A source without the documents that are, token for token, held out elsewhere: data that ``make_data.py`` wrote
    for several epochs hold each document as often.

    Of documents as long as a held-out one the ends are read, and what lies between only where the ends agree.
    Raises: UserError if no document is left.
    """
    # [size, ends] of the documents held out, and what tells those from each other
    ends = {_ends_of(part.read(index)) for part in held_out for index in range(len(part))}
    whole = {_digest(part.read(index)) for part in held_out for index in range(len(part))}
    sizes = np.concatenate([part.sizes for part in held_out])
    is_copy = np.zeros(len(source), dtype=bool)
    for index in np.flatnonzero(np.isin(source.sizes, sizes)).tolist():
        tokens = source.read(index)
        is_copy[index] = _ends_of(tokens) in ends and _digest(tokens) in whole
    n_copies = int(is_copy.sum())
    if not n_copies:
        return source
    if n_copies == len(source):
        raise UserError(
            f"--val_split leaves nothing of {source.name}: every document is a copy of a held-out one",
            fix="data that hold each document once, as make_data.py with N_EPOCH 1 writes them",
        )
    note = f"{n_copies:,} copies of held-out documents are not trained on; data that hold each document once lose none"
    kept = np.flatnonzero(~is_copy)
    if isinstance(source, DocumentsOf):
        return DocumentsOf(source.source, source.documents[kept], source.name, (note,))
    return DocumentsOf(source, kept, source.name, (note,))


def _ends_of(tokens: Tokens) -> bytes:
    ends = np.concatenate([[len(tokens)], tokens[:_COMPARED], tokens[-_COMPARED:]])
    return ends.astype(np.int64).tobytes()


def _digest(tokens: Tokens) -> bytes:
    # sources of one run may hold tokens in different types
    return hashlib.blake2b(tokens.astype(np.int64).tobytes(), digest_size=16).digest()


def held_out_count(n: int, share: float) -> int:
    """How many of ``n`` documents are held out; a share of some documents is at least one."""
    return round(share) if share >= 1 else max(1, round(share * n))


def shared_out(count: int, sizes: Sequence[int]) -> list[int]:
    """``count`` documents taken from sources of these sizes, in proportion to them."""
    total = sum(sizes)
    ends = [count * end // total for end in np.cumsum([0, *sizes]).tolist()]
    return [after - before for before, after in itertools.pairwise(ends)]
