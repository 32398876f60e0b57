"""Rows of preferred answers: what both answers share, the chosen one, the rejected one, and for kto one to another
prompt.

Letters: A answers to a prompt, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.data.pair_batches import PAIR, WITH_MISMATCHED, PairCollator, packed
from rwkvpeft.data.pair_block import Part
from rwkvpeft.data.pair_report import PairReport
from rwkvpeft.data.pair_source import PairSource
from rwkvpeft.data.row import Joining, Row
from rwkvpeft.data.rows import DocumentDataset, Sample
from rwkvpeft.data.sampling import mix, permute_many, sample_index, sample_indices
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.splitting import DocumentsOf

_PARTNER_KEY = mix(0x4B544F)
# an answer to the very prompt is no mismatched one
_TRIES = 16
# tokens that the operators in PyTorch work on at once
_CHUNK = 32


class _Counts(NamedTuple):
    """Of each record: ``lengths`` (n, 3) inputs of the shared part and of both answers, cut; ``scored`` (n, 2)
    scored tokens left of either; ``is_cut`` (n,) bool."""

    lengths: NDArray[np.int64]
    scored: NDArray[np.int64]
    is_cut: NDArray[np.bool_]


class PairRows(DocumentDataset):
    """A row is a record: a packed row of 1 + A sequences, the shared part first; an answer that is not there is empty.

    An answer is cut where it has ``ctx_len`` tokens with its prompt. A record is left out if nothing that is scored
    remains of one of its answers, or if its answers are alike up to the cut.

    Attributes:
        answers: A, 2, or 3 with an answer to another prompt.
        records: (len,) the number of each row's record in the source.
        reference: (len, A) fp32, the reference's log-probability of each answer's scored tokens, which then lie beside
            the rows; set it before workers start.
    """

    joining: Joining = "packed"

    def __init__(
        self,
        source: TokenSource,
        ctx_len: int,
        *,
        seed: int,
        shuffle: bool,
        answers: int,
        mask_think: bool = False,
    ) -> None:
        """Args: ``source``: a ``PairSource``, or some documents of one; ``mask_think``: do not score thoughts."""
        super().__init__(ctx_len)
        self.source = source
        self.seed, self.shuffle = seed, shuffle
        self.answers = answers
        self.collator = PairCollator(answers)
        self.reference: NDArray[np.float32] | None = None
        self._pairs, numbers = _whole(source)
        self._is_scored = _scored_voices(self._pairs, mask_think)
        counts = self._count(numbers)
        kept = self._usable(numbers, counts)
        self.records = numbers[kept]
        self._counts = _Counts(counts.lengths[kept], counts.scored[kept], counts.is_cut[kept])
        self._partners = self._find_partners() if answers == WITH_MISMATCHED else None
        self._lengths = self._with_partners()
        self.lengths = self._lengths.sum(axis=1)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def crowded_row(self) -> tuple[int, ...]:
        """See ``RowDataset``: shared part and answers of the row that takes most to work through."""
        filled = (-(-self._lengths // _CHUNK) * _CHUNK).sum(axis=1)
        return tuple(self._lengths[int(filled.argmax())].tolist())

    def row(self, index: int) -> Row:
        """Record number ``index`` of those that are not left out."""
        record = int(self.records[index])
        tokens, scored = self._read(record)
        chosen, rejected = self.parts(record)
        shared = chosen.start
        labels = tokens[1 : shared + 1]
        rows = [Row(tokens[:shared], labels, np.zeros(shared, dtype=np.float32))]
        rows += [self._answer(tokens[part.start : part.stop], scored[part.start : part.stop], shared)
                 for part in (chosen, rejected)]
        if self._partners is not None:
            rows.append(self._mismatched(index, shared))
        row = packed(rows)
        if self.reference is None:
            return row
        return row._replace(beside={"reference": self.reference[index : index + 1].astype(np.float32)})

    def parts(self, record: int) -> tuple[Part, Part]:
        """Where the answers of a record of the source lie."""
        chosen, rejected = self._pairs.parts[record].tolist()
        return Part(*chosen), Part(*rejected)

    def sharing_nothing(self) -> list[int]:
        """The rows whose answers do not begin alike."""
        shared: list[int] = np.flatnonzero(self._lengths[:, 0] == 0).tolist()
        return shared

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See ``DocumentDataset``."""
        return sample_indices(positions, len(self), self.seed, self.shuffle)

    def label(self, index: int) -> str:
        """See ``DocumentDataset``: FILE:LINE."""
        return self._pairs.label(int(self.records[index]))

    def replaced(self) -> list[str]:
        """See ``RowDataset``."""
        return [self.source.name] if self.source.is_replaced() else []

    def draw(self, position: int) -> Sample:
        """Each pass over the records has its own order."""
        index = sample_index(position, len(self), self.seed, self.shuffle)
        return Sample(self.row(index), self.label(index), int(self.lengths[index]), bool(self._counts.is_cut[index]))

    def report(self) -> PairReport:
        """Counts; a trained token is one that is scored, of either answer."""
        all_records = len(self.source)
        return PairReport(
            documents=all_records,
            tokens=self.source.n_tokens,
            longest=int(self.source.sizes.max(initial=0)),
            rows=len(self),
            ctx_len=self.ctx_len,
            trained_tokens=int(self._counts.scored.sum()),
            cut_endings=int(self._counts.is_cut.sum()),
            empty_rows=all_records - len(self),
            scanned_documents=all_records,
            notes=(*self.source.notes, *self._alone()),
            unpaired=self._count_unpaired(),
            shared_tokens=int(self._lengths[:, 0].sum()),
            answer_tokens=int(self._lengths[:, 1 : 1 + PAIR].sum()),
        )

    def _alone(self) -> list[str]:
        """A note on rows without an answer to another prompt, where there should be one."""
        alone = 0 if self._partners is None else int((self._partners[:, 0] < 0).sum())
        told = "nothing to compare with: there is no answer to another prompt"
        return [f"{alone:,} of {len(self):,} rows have {told}"] if alone else []

    def _count_unpaired(self) -> int:
        _, numbers = _whole(self.source)
        parts = self._pairs.parts[numbers]
        return int((parts[:, :, 0] == parts[:, :, 2]).any(axis=1).sum())

    def _read(self, record: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The tokens of a record, and which of them are scored."""
        tokens = self._pairs.read(record).astype(np.int64)
        return tokens, self._is_scored[self._pairs.spoken(record).codes]

    def _answer(self, tokens: NDArray[np.int64], scored: NDArray[np.bool_], shared: int) -> Row:
        """An answer behind so many shared tokens, from the token it is predicted from."""
        tokens = tokens[: self.ctx_len - shared + 1]
        return Row(tokens[:-1], tokens[1:], scored[1 : len(tokens)].astype(np.float32))

    def _mismatched(self, index: int, shared: int) -> Row:
        """The answer of another record behind this one's prompt: the tokens of both, put together."""
        assert self._partners is not None
        other, number = self._partners[index].tolist()
        if other < 0:
            return self._answer(np.empty(0, dtype=np.int64), np.empty(0, dtype=bool), shared)
        own, _ = self._read(int(self.records[index]))
        theirs, scored = self._read(int(self.records[other]))
        before, part = self._before(index), self.parts(int(self.records[other]))[number]
        tokens = np.concatenate([own[before.start : before.answer], theirs[part.answer : part.stop]])
        scored = np.concatenate([np.zeros(before.answer - before.start, dtype=bool), scored[part.answer : part.stop]])
        return self._answer(tokens, scored, shared)

    def _before(self, index: int) -> Part:
        """The first answer of a record that is there, in front of which the rest of the prompt stands."""
        return next(part for part in self.parts(int(self.records[index])) if part.stop > part.start)

    def _count(self, numbers: NDArray[np.int64]) -> _Counts:
        lengths, scored = np.zeros((len(numbers), 3), dtype=np.int64), np.zeros((len(numbers), 2), dtype=np.int64)
        is_cut = np.zeros(len(numbers), dtype=bool)
        for row, record in enumerate(numbers.tolist()):
            codes = self._pairs.spoken(record).codes
            parts = self.parts(record)
            room = self.ctx_len - parts[0].start + 1
            lengths[row, 0] = parts[0].start
            for number, part in enumerate(parts):
                stop = min(part.stop, part.start + max(1, room))
                lengths[row, 1 + number] = max(0, stop - part.start - 1)
                scored[row, number] = np.count_nonzero(self._is_scored[codes[part.start + 1 : stop]])
                is_cut[row] |= stop < part.stop
        return _Counts(lengths, scored, is_cut)

    def _usable(self, numbers: NDArray[np.int64], counts: _Counts) -> NDArray[np.bool_]:
        """Which records have something to score in each of their answers, and answers that differ."""
        usable = np.ones(len(numbers), dtype=bool)
        for row, record in enumerate(numbers.tolist()):
            parts = self.parts(record)
            there = [part.stop > part.start for part in parts]
            usable[row] = all(counts.scored[row][there])
            if usable[row] and all(there) and counts.is_cut[row]:
                tokens = self._pairs.read(record)
                chosen, rejected = (tokens[part.start : part.start + 1 + length]
                                    for part, length in zip(parts, counts.lengths[row, 1:].tolist(), strict=True))
                usable[row] = not np.array_equal(chosen, rejected)
        return usable

    def _find_partners(self) -> NDArray[np.int64]:
        """(len, 2) for each row another row and which of its answers, -1 where there is none: the next one in a fixed
        order that has another prompt."""
        n = len(self)
        order = permute_many(np.arange(n, dtype=np.int64), n, _PARTNER_KEY) if n else np.empty(0, dtype=np.int64)
        prompts = [self._pairs.prompt(record) for record in self.records.tolist()]
        partners = np.full((n, 2), -1, dtype=np.int64)
        for place, index in enumerate(order.tolist()):
            later = (int(order[(place + step) % n]) for step in range(1, min(_TRIES, n)))
            other = next((other for other in later if prompts[other] != prompts[index]), -1)
            if other >= 0:
                there = [number for number in range(PAIR) if self._counts.scored[other, number]]
                partners[index] = other, there[mix(_PARTNER_KEY, index) % len(there)]
        return partners

    def _with_partners(self) -> NDArray[np.int64]:
        """(len, 1 + A) inputs of the shared part and of each answer."""
        if self._partners is None:
            return self._counts.lengths
        own = np.zeros((len(self), 1), dtype=np.int64)
        for index, (other, number) in enumerate(self._partners.tolist()):
            if other >= 0:
                before, part = self._before(index), self.parts(int(self.records[other]))[number]
                whole = before.answer - before.start + part.stop - part.answer - 1
                own[index] = min(whole, self.ctx_len - int(self._counts.lengths[index, 0]))
        return np.concatenate([self._counts.lengths, own], axis=1)


def _whole(source: TokenSource) -> tuple[PairSource, NDArray[np.int64]]:
    """The source of all pairs, and the numbers in it of those that are meant."""
    pairs = source.source if isinstance(source, DocumentsOf) else source
    assert isinstance(pairs, PairSource)
    numbers = source.documents if isinstance(source, DocumentsOf) else np.arange(len(pairs), dtype=np.int64)
    return pairs, numbers


def _scored_voices(source: PairSource, mask_think: bool) -> NDArray[np.bool_]:
    """For each voice whether its tokens are scored."""
    return np.array([voice.weight > 0 and not (voice.is_think and mask_think) for voice in source.voices])
