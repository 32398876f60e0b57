"""``--data_file`` with preferred answers: opened, split and mixed as other data are."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.config.data_files import data_files
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.dataset import Part, mixture, seed_of, split_parts
from rwkvpeft.data.mixing import MixedDocuments
from rwkvpeft.data.pair_batches import WITH_MISMATCHED
from rwkvpeft.data.pair_report import PairReport
from rwkvpeft.data.pair_source import open_pair_source
from rwkvpeft.data.pairs import PairRows
from rwkvpeft.errors import UserError


class MixedPairs(MixedDocuments):
    """Pairs of several files, each drawn in its own passes. Mismatched answers are those of the same file.

    Attributes:
        answers: to each prompt.
    """

    def __init__(self, parts: Sequence[PairRows], shares: Sequence[Fraction], names: Sequence[str]) -> None:
        super().__init__(parts, shares, names)
        self.pairs = parts
        self.answers = parts[0].answers
        self.collator = parts[0].collator

    @property
    def crowded_row(self) -> tuple[int, ...]:
        """See ``RowDataset``: of each part's such row the longest."""
        return max((part.crowded_row for part in self.pairs), key=sum)

    @property
    def reference(self) -> NDArray[np.float32] | None:
        """(len, A) fp32: see ``PairRows``."""
        known = [part.reference for part in self.pairs if part.reference is not None]
        return np.concatenate(known) if len(known) == len(self.pairs) else None

    @reference.setter
    def reference(self, reference: NDArray[np.float32] | None) -> None:
        for part, start in zip(self.pairs, self._starts.tolist(), strict=False):
            part.reference = None if reference is None else reference[start : start + len(part)]

    def report(self) -> PairReport:
        """See ``MixedRows``."""
        mixed = super().report().mixed
        return PairReport.of_pairs([part.report() for part in self.pairs], mixed)


Pairs = PairRows | MixedPairs


def open_pairs(config: DataConfig, *, ctx_len: int, vocab_size: int, seed: int, answers: int) -> Pairs:
    """Open the preference data of a run.

    Args:
        config: files, formats, tokenizer, mask_think and data_shuffle are read.
        ctx_len: tokens that a prompt and an answer may have together.
        vocab_size: token ids of the model.
        seed: of the order of rows.
        answers: 2; 3 for an answer to another prompt beside, and for records with one labelled answer.
    Raises: UserError with FILE:LINE for a record that is no pair, and if nothing can be learned from.
    """
    return _rows(config, _open_parts(config, vocab_size, answers), ctx_len, seed, answers)


def open_pairs_split(
    config: DataConfig, share: float, *, ctx_len: int, vocab_size: int, seed: int, answers: int
) -> tuple[Pairs, Pairs]:
    """``open_pairs`` without some of the records, and these; copies are on one side. Arguments as of ``open_split``.

    Raises: UserError as ``open_pairs`` does, also for too few records.
    """
    kept, held_out = split_parts(_open_parts(config, vocab_size, answers), share)
    return _rows(config, kept, ctx_len, seed, answers), _rows(config, held_out, ctx_len, seed, answers)


def _open_parts(config: DataConfig, vocab_size: int, answers: int) -> list[Part]:
    unpaired = answers == WITH_MISMATCHED
    parts = [
        Part(*part, open_pair_source(config, part.path, unpaired=unpaired)) for part in data_files(config.data_file)
    ]
    for part in parts:
        part.source.check(vocab_size)
    return parts


def _rows(config: DataConfig, parts: list[Part], ctx_len: int, seed: int, answers: int) -> Pairs:
    each = [
        PairRows(part.source, ctx_len, seed=seed_of(seed, number), shuffle=bool(config.data_shuffle), answers=answers,
                 mask_think=config.mask_think)
        for number, part in enumerate(parts)
    ]
    for part, rows in zip(parts, each, strict=True):
        rows.tokenizer = config.tokenizer
        if not len(rows):
            raise _nothing_left(part, ctx_len)
    return each[0] if len(each) == 1 else MixedPairs(each, *mixture(parts))


def _nothing_left(part: Part, ctx_len: int) -> UserError:
    return UserError(
        f"no pair of {part.source.name} has anything to score in both answers within --ctx_len {ctx_len}",
        found=f"{len(part.source):,} records, the shortest of {int(part.source.sizes.min())} tokens",
        fix="a larger --ctx_len; with --mask_think, answers with more than thoughts",
    )
