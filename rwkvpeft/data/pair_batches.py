"""Rows of preferred answers become batches. P rows, A answers to each, S shared tokens, T tokens of answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch

from rwkvpeft.data.batches import PreferenceBatch
from rwkvpeft.data.collate import Weight
from rwkvpeft.data.row import Row, apart, one_behind_another, together
from rwkvpeft.ops.sequences import Sequences

PAIR = 2
"""Answers to a prompt, chosen and rejected."""

WITH_MISMATCHED = 3
"""The same and an answer to another prompt, which kto compares with."""


class PairCollator:
    """Puts what answers share in front of all answers. Its rows are packed: shared part, then ``answers`` answers."""

    def __init__(self, answers: int) -> None:
        self.answers = answers

    def weigh(self, rows: Sequence[Row]) -> Weight:
        """Examples and scored tokens of chosen answers; an example is a pair, or for kto an answer."""
        examples, chosen_tokens = 0, 0
        for row in rows:
            scored = [int(np.count_nonzero(answer.weights)) for answer in list(apart(row))[1 : 1 + PAIR]]
            examples += sum(count > 0 for count in scored) if self.answers == WITH_MISMATCHED else all(scored)
            chosen_tokens += scored[0]
        return np.array([examples, chosen_tokens], dtype=np.float64)

    def join(self, rows: Sequence[Row]) -> Row:
        """One row of arrays (1, S + T): the shared parts of all, then the answers of all."""
        parts = [list(apart(row)) for row in rows]
        joined = one_behind_another([*(part[0] for part in parts), *chain(*(part[1:] for part in parts))])
        beside = together(rows, np.concatenate)
        return Row(joined.input_ids[None], joined.labels[None], joined.weights[None], joined.lengths, beside)

    def batch(self, joined: Row, step_weight: Weight) -> PreferenceBatch:
        """The batch of joined rows."""
        assert joined.lengths is not None
        prompts = len(joined.lengths) // (1 + self.answers)
        shared, answers = Sequences(joined.lengths[:prompts]), Sequences(joined.lengths[prompts:])
        input_ids, labels, weights = (torch.from_numpy(array) for array in joined[:3])
        reference = None if joined.beside is None else torch.from_numpy(joined.beside["reference"])
        return PreferenceBatch(
            shared_ids=input_ids[:, : shared.tokens],
            shared=shared,
            input_ids=input_ids[:, shared.tokens :],
            labels=labels[:, shared.tokens :],
            weights=weights[:, shared.tokens :],
            answers=answers,
            step_weight=torch.as_tensor(step_weight, dtype=torch.float64),
            reference=reference,
        )


def preferred(row: Row) -> Row:
    """The prompt of a row with the chosen answer behind it, as one document; without one that is not there."""
    return one_behind_another(list(apart(row))[:2])._replace(lengths=None)


def packed(parts: Iterator[Row] | Sequence[Row]) -> Row:
    """The packed row of a shared part and its answers, each of which may be empty."""
    return one_behind_another([part._replace(lengths=(len(part.input_ids),)) for part in parts])
