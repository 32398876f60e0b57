"""Rows of prompts that the model is to answer itself. P prompts, T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rwkvpeft.config.data_files import data_files
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.batches import PromptBatch
from rwkvpeft.data.collate import Weight
from rwkvpeft.data.dataset import Part, mixture, seed_of, split_parts
from rwkvpeft.data.mixing import MixedDocuments
from rwkvpeft.data.pair_source import records_of
from rwkvpeft.data.prompt_source import PromptSource
from rwkvpeft.data.report import DataReport
from rwkvpeft.data.row import Joining, Row, one_behind_another
from rwkvpeft.data.rows import DocumentDataset, Sample
from rwkvpeft.data.sampling import sample_index, sample_indices
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.splitting import DocumentsOf
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.ops.sequences import Sequences


class PromptCollator:
    """Puts prompts one behind another. What a batch weighs is the number of its prompts."""

    def weigh(self, rows: Sequence[Row]) -> Weight:
        """See the class."""
        return float(len(rows))

    def join(self, rows: Sequence[Row]) -> Row:
        """One row of arrays (1, T)."""
        row = one_behind_another(rows)
        return row._replace(input_ids=row.input_ids[None], labels=row.labels[None], weights=row.weights[None])

    def batch(self, joined: Row, step_weight: Weight) -> PromptBatch:
        """The batch of joined rows."""
        assert joined.lengths is not None
        assert joined.beside is not None
        return PromptBatch(
            input_ids=torch.from_numpy(joined.input_ids),
            prompts=Sequences(joined.lengths),
            documents=torch.from_numpy(joined.beside["document"]),
            places=torch.from_numpy(joined.beside["place"]),
            step_weight=torch.as_tensor(step_weight, dtype=torch.float64),
        )


class PromptRows(DocumentDataset):
    """A row is a prompt, with the number of its record and the place in the run it was drawn at beside it.

    A prompt of more than ``ctx_len`` tokens is left out.

    Attributes:
        numbers: of the records in the source, which the two sides of a split share; two data sets that are to be told
            apart by them begin at different ones.
    """

    joining: Joining = "packed"
    collator = PromptCollator()

    def __init__(
        self, source: TokenSource, ctx_len: int, *, seed: int, shuffle: bool, first_number: int = 0
    ) -> None:
        """Args: ``source``: a ``PromptSource``, or some documents of one; ``first_number``: of its first record."""
        super().__init__(ctx_len)
        self.source = source
        self.seed, self.shuffle = seed, shuffle
        prompts = source.source if isinstance(source, DocumentsOf) else source
        assert isinstance(prompts, PromptSource)
        self._prompts = prompts
        of_source = source.documents if isinstance(source, DocumentsOf) else np.arange(len(source), dtype=np.int64)
        self._records = of_source[source.sizes <= ctx_len]
        self.lengths = prompts.sizes[self._records]
        self.numbers = range(first_number, first_number + len(prompts))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def crowded_row(self) -> tuple[int, ...]:
        """See ``RowDataset``: the longest prompt."""
        return (self.longest_row,)

    def record(self, number: int) -> Mapping[str, Any]:
        """The record with that number: its fields, and ``prompt_text``. Raises: ContractError for another's number."""
        if number not in self.numbers:
            raise ContractError(f"record {number} is none of {self.source.name}")
        return self._prompts.records[number - self.numbers.start]

    def row(self, index: int) -> Row:
        """Prompt number ``index`` of those that are not left out; its place is the number of its record."""
        record = int(self._records[index])
        return self._row(record, place=self.numbers.start + record)

    def sample(self, position: int) -> Row:
        """See ``RowDataset``: the position is the prompt's place."""
        index = sample_index(position, len(self), self.seed, self.shuffle)
        return self._row(int(self._records[index]), place=position)

    def draw(self, position: int) -> Sample:
        """Each pass over the prompts has its own order."""
        row = self.sample(position)
        assert row.beside is not None
        label = self._prompts.label(int(row.beside["document"][0]) - self.numbers.start)
        return Sample(row, label, len(row.input_ids), is_cut=False)

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See ``DocumentDataset``; the places of ``row`` are others."""
        return sample_indices(positions, len(self), self.seed, self.shuffle)

    def label(self, index: int) -> str:
        """See ``DocumentDataset``: FILE:LINE."""
        return self._prompts.label(int(self._records[index]))

    def replaced(self) -> list[str]:
        """See ``RowDataset``."""
        return [self.source.name] if self.source.is_replaced() else []

    def report(self) -> DataReport:
        """Counts; nothing of a prompt is trained."""
        return PromptReport(
            documents=len(self.source),
            tokens=self.source.n_tokens,
            longest=int(self.source.sizes.max(initial=0)),
            rows=len(self),
            ctx_len=self.ctx_len,
            trained_tokens=0,
            cut_endings=0,
            empty_rows=len(self.source) - len(self),
            scanned_documents=len(self.source),
            notes=self.source.notes,
        )

    def _row(self, record: int, place: int) -> Row:
        tokens = self._prompts.read(record).astype(np.int64)
        beside = {"document": np.array([self.numbers.start + record]), "place": np.array([place])}
        # what follows the last token is what the model is asked for
        return Row(tokens, np.append(tokens[1:], 0), np.zeros(len(tokens), dtype=np.float32), (len(tokens),), beside)


class MixedPrompts(MixedDocuments):
    """Prompts of several files, each drawn in its own passes."""

    collator = PromptCollator()

    def __init__(self, parts: Sequence[PromptRows], shares: Sequence[Fraction], names: Sequence[str]) -> None:
        super().__init__(parts, shares, names)
        self.prompts = parts
        self.numbers = range(min(part.numbers.start for part in parts), max(part.numbers.stop for part in parts))

    @property
    def crowded_row(self) -> tuple[int, ...]:
        """See ``RowDataset``: the longest prompt."""
        return (self.longest_row,)

    def record(self, number: int) -> Mapping[str, Any]:
        """See ``PromptRows``."""
        return record_of(self.prompts, number)

    def sample(self, position: int) -> Row:
        """See ``RowDataset``: the position is the prompt's place."""
        row = super().sample(position)
        return row._replace(beside={**(row.beside or {}), "place": np.array([position])})

    def report(self) -> DataReport:
        """See ``MixedRows``."""
        return PromptReport(**vars(super().report()))


Prompts = PromptRows | MixedPrompts


@dataclass(frozen=True)
class PromptReport(DataReport):
    """``documents`` are records, ``rows`` the prompts that are answered."""

    def render(self) -> str:
        """The counts as text; what needs attention stands on lines of its own."""
        lines = [f"data: {self.documents:,} prompts, {self.tokens:,} tokens, the longest {self.longest:,}"]
        if self.mixed:
            lines.append(f"mixed: {self.mixed_parts}")
        lines += [f"note: {note}" for note in self.notes]
        if self.empty_rows:
            lines.append(f"note: {self.empty_rows:,} prompts longer than --ctx_len {self.ctx_len:,} left out")
        return "\n".join(lines)


def record_of(datasets: Sequence[Prompts], number: int) -> Mapping[str, Any]:
    """The record with that number of the first data set that has it. Raises: ContractError if none has."""
    for dataset in datasets:
        if number in dataset.numbers:
            return dataset.record(number)
    raise ContractError(f"no data set has a record {number}")


def open_prompts(
    config: DataConfig, *, ctx_len: int, vocab_size: int, seed: int, first_number: int = 0
) -> Prompts:
    """Open the prompts of a run.

    Args:
        config: files, formats, tokenizer, text_key and data_shuffle are read.
        ctx_len: tokens that a prompt may have.
        vocab_size: token ids of the model.
        seed: of the order of prompts.
        first_number: of the first record; held-out prompts of other files go on behind the trained ones.
    Raises: UserError with FILE:LINE for a record without a prompt, and if all prompts are too long.
    """
    parts = _open_parts(config, vocab_size)
    return _rows(config, parts, _numbers(parts, first_number), ctx_len, seed)


def open_prompts_split(
    config: DataConfig, share: float, *, ctx_len: int, vocab_size: int, seed: int
) -> tuple[Prompts, Prompts]:
    """``open_prompts`` without some of the prompts, and these; copies are on one side. Arguments as of ``open_split``.

    Raises: UserError as ``open_prompts`` does, also for too few prompts.
    """
    parts = _open_parts(config, vocab_size)
    numbers = _numbers(parts, 0)
    kept, held_out = split_parts(parts, share)
    return _rows(config, kept, numbers, ctx_len, seed), _rows(config, held_out, numbers, ctx_len, seed)


def _open_parts(config: DataConfig, vocab_size: int) -> list[Part]:
    tokenizer = load_tokenizer(config.tokenizer)
    parts = [
        Part(*part, PromptSource(part.path, records_of(config, part.path), tokenizer, config.text_key))
        for part in data_files(config.data_file)
    ]
    for part in parts:
        part.source.check(vocab_size)
    return parts


def _numbers(parts: Sequence[Part], first: int) -> dict[str, int]:
    """The first number of each file's records; a file that is named twice has those of the first time."""
    numbers: dict[str, int] = {}
    for part in parts:
        if part.path not in numbers:
            numbers[part.path] = first
            first += len(part.source)
    return numbers


def _rows(config: DataConfig, parts: list[Part], numbers: Mapping[str, int], ctx_len: int, seed: int) -> Prompts:
    each = [
        PromptRows(part.source, ctx_len, seed=seed_of(seed, number), shuffle=bool(config.data_shuffle),
                   first_number=numbers[part.path])
        for number, part in enumerate(parts)
    ]
    for part, rows in zip(parts, each, strict=True):
        rows.tokenizer = config.tokenizer
        if not len(rows):
            raise UserError(
                f"every prompt of {part.source.name} is longer than --ctx_len",
                found=f"{len(part.source):,} prompts, the shortest of {int(part.source.sizes.min())} tokens",
                expected=f"at most {ctx_len}",
            )
    return each[0] if len(each) == 1 else MixedPrompts(each, *mixture(parts))
