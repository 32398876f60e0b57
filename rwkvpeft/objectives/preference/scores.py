"""What a model says of whole answers, and what it said before training.

Letters: P prompts, A answers to each, T tokens of all answers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvpeft.data.batches import PreferenceBatch
from rwkvpeft.errors import ContractError
from rwkvpeft.objectives.answers import evaluating, read_answers
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.label_logprobs import label_logprobs
from rwkvpeft.ops.sequences import Sequences


class Scores(NamedTuple):
    """What a model says of the answers, (P, A) each in fp32 or fp64, 0 for an answer that is not there.

    ``logprobs`` is the sum of the log-probabilities of an answer's scored tokens, differentiable; ``tokens`` how many
    these are; ``collisions`` the sum of the logarithms of sum_v p_v^2 over them, if that was asked for.
    """

    logprobs: Tensor
    tokens: Tensor
    collisions: Tensor | None = None

    def means(self, sums: Tensor) -> Tensor:
        """Sums (P, n) of the first n answers' tokens as means over these."""
        return sums / self.tokens[:, : sums.shape[1]].clamp(min=1)

    @property
    def pairs(self) -> Tensor:
        """Which prompts have a scored chosen and a scored rejected answer, (P,) bool."""
        return (self.tokens[:, :2] > 0).all(dim=1)


def score_answers(model: Any, batch: PreferenceBatch, provided: Provided, *, collision: bool = False) -> Scores:
    """Read the prompts once and their answers from there on; gradients are those of reading each answer whole."""
    hidden = read_answers(model, batch.shared_ids, batch.shared, batch.input_ids, batch.answers)
    found = label_logprobs(model, hidden, batch.labels, batch.weights, provided, collision=collision)
    answers = _Places(batch, hidden.device)
    collisions = None if found.collision is None else answers.sums(found.collision)
    return Scores(answers.sums(found.logprobs), answers.sums((batch.weights > 0).flatten().to(found.logprobs)),
                  collisions)


def reference_logprobs(model: Any, batch: PreferenceBatch, provided: Provided) -> Tensor:
    """The sums of log-probabilities to compare with, (P, A): those of the batch, or the model's without its adapter.

    Call it before the trained model reads the answers: what that keeps for its backward pass must not be exchanged in
    between. Nothing drops out here, or the same answers would be compared with something else each time.

    Raises: ContractError if there is neither an adapter nor a reference in the batch.
    """
    if batch.reference is not None:
        return batch.reference
    if provided.adapter is None:
        raise ContractError("neither an adapter to switch off nor log-probabilities of a reference")
    with torch.no_grad(), evaluating(model), provided.adapter.disabled(model):
        return score_answers(model, batch, provided).logprobs


def some_answers(batch: PreferenceBatch, first: int, last: int) -> PreferenceBatch:
    """The batch with the answers ``first`` up to before ``last`` to each prompt alone."""
    columns = len(batch.answers.lengths) // len(batch.shared.lengths)
    numbers = [number for number in range(len(batch.answers.lengths)) if first <= number % columns < last]
    spans = [torch.arange(batch.answers.offsets[number], batch.answers.offsets[number + 1]) for number in numbers]
    index = torch.cat(spans).to(batch.input_ids.device)
    return batch._replace(
        input_ids=batch.input_ids[:, index],
        labels=batch.labels[:, index],
        weights=batch.weights[:, index],
        answers=Sequences([batch.answers.lengths[number] for number in numbers]),
        reference=None if batch.reference is None else batch.reference[:, first:last],
    )


class _Places:
    """Where each token of the packed answers stands: in which answer, and as which of its tokens."""

    def __init__(self, batch: PreferenceBatch, device: torch.device) -> None:
        lengths = torch.tensor(batch.answers.lengths)
        answer = torch.arange(len(lengths)).repeat_interleave(lengths)
        token = torch.arange(len(answer)) - torch.tensor(batch.answers.offsets[:-1])[answer]
        self._index = answer.to(device), token.to(device)
        self._sizes = len(lengths), max(batch.answers.lengths)
        self._prompts = len(batch.shared.lengths)

    def sums(self, values: Tensor) -> Tensor:
        """Values of all tokens (T,) as their sums over each answer, (P, A)."""
        # unlike a sum by index, this adds up in the same order in every run on a GPU too
        table = values.new_zeros(self._sizes).index_put(self._index, values)
        return table.sum(dim=1).view(self._prompts, -1)
