"""What travels from the data loader to an objective.

NamedTuples, because Lightning moves them to the device with their type kept. Every one of them has ``step_weight``,
() or (n,) fp64: what its loss is divided by, summed over all micro-batches of this rank that share one optimizer step,
so that a loss can be a mean over the step; where a loss has several means, the first is that of what is logged.
Letters: B rows, T tokens, P prompts, A answers to each of them, K tokens that a teacher tells apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rwkvpeft.ops.sequences import Sequences


class Batch(Protocol):
    """What the training loop knows of any batch."""

    @property
    def step_weight(self) -> Tensor:
        """See the module."""
        ...

    @property
    def positions(self) -> int:
        """Positions that the model reads, padding included."""
        ...


class TokenBatch(NamedTuple):
    """Rows of tokens and what to learn from them.

    ``input_ids`` (B, T) int64; ``labels`` (B, T) int64, the token that follows each input; ``weights`` (B, T) fp32,
    how much each label counts, 0 where nothing is trained. ``step_weight`` () is the sum of the weights.
    ``sequences`` are the documents of a packed batch, then (1, T); None where each row is one document.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    step_weight: Tensor
    sequences: Sequences | None = None

    @property
    def positions(self) -> int:
        """See ``Batch``."""
        return self.input_ids.numel()

    def on(self, device: torch.device | str) -> TokenBatch:
        """The batch on a device."""
        there: TokenBatch = moved(self, device)
        return there

    def cut(self, tokens: int) -> Iterator[TokenBatch]:
        """All rows, so many tokens at a time."""
        for parts in zip(*(part.split(tokens, dim=1) for part in self[:3]), strict=True):
            yield self._replace(input_ids=parts[0], labels=parts[1], weights=parts[2])


class DistillationBatch(NamedTuple):
    """A ``TokenBatch``, and what a teacher says of the token that follows each input.

    ``teacher_ids`` (B, T, K) int32, its likeliest tokens; ``teacher_logprobs`` (B, T, K) fp32, their log-probabilities
    at the temperature of the run, over the whole vocabulary; ``teacher_tail`` (B, T) fp32, the logarithm of what is
    left for all other tokens, -inf where nothing is.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    step_weight: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor
    teacher_tail: Tensor
    sequences: Sequences | None = None

    @property
    def positions(self) -> int:
        """See ``Batch``."""
        return self.input_ids.numel()

    def on(self, device: torch.device | str) -> DistillationBatch:
        """The batch on a device."""
        there: DistillationBatch = moved(self, device)
        return there

    def cut(self, tokens: int) -> Iterator[DistillationBatch]:
        """All rows, so many tokens at a time."""
        cut = [part.split(tokens, dim=1) for part in (*self[:3], *self[4:7])]
        for ids, labels, weights, told, logprobs, tail in zip(*cut, strict=True):
            yield DistillationBatch(ids, labels, weights, self.step_weight, told, logprobs, tail, self.sequences)


class PreferenceBatch(NamedTuple):
    """Prompts, and A answers to each.

    ``shared_ids`` (1, S) int64 are what the answers to each prompt have in common, one prompt behind another, less the
    last token of each, with which each of its answers begins: ``shared`` are their P sequences, some perhaps empty.
    ``input_ids``, ``labels`` (1, T) int64 and ``weights`` (1, T) fp32 are the answers, those to one prompt behind
    another: ``answers`` are P * A sequences, in the order chosen, rejected (and for KTO one to another prompt); one
    without tokens is not there. A weight above 0 marks a token that is scored.
    ``step_weight`` (2,): examples (pairs; for KTO answers), and scored tokens of chosen answers.
    ``reference`` (P, A) fp32, sums of the reference's log-probabilities if they were worked out before; otherwise None.
    """

    shared_ids: Tensor
    shared: Sequences
    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    answers: Sequences
    step_weight: Tensor
    reference: Tensor | None = None

    @property
    def positions(self) -> int:
        """See ``Batch``."""
        return self.shared_ids.numel() + self.input_ids.numel()

    def on(self, device: torch.device | str) -> PreferenceBatch:
        """The batch on a device."""
        there: PreferenceBatch = moved(self, device)
        return there


class PromptBatch(NamedTuple):
    """Prompts that the model is to answer itself.

    ``input_ids`` (1, T) int64, one prompt behind another: ``prompts`` are P sequences. ``documents`` (P,) int64, their
    records' numbers in the data; ``places`` (P,) int64, where in the run they were drawn, which their answers' seeds
    come from. ``step_weight`` (): prompts.
    """

    input_ids: Tensor
    prompts: Sequences
    documents: Tensor
    places: Tensor
    step_weight: Tensor

    @property
    def positions(self) -> int:
        """See ``Batch``; answers are not among them."""
        return self.input_ids.numel()

    def on(self, device: torch.device | str) -> PromptBatch:
        """The batch on a device; what no computation reads stays."""
        return self._replace(input_ids=self.input_ids.to(device), step_weight=self.step_weight.to(device))


def moved(batch: Any, device: torch.device | str) -> Any:
    """A batch with all its tensors on a device."""
    tensors = {name: part.to(device) for name, part in batch._asdict().items() if isinstance(part, Tensor)}
    return batch._replace(**tensors)
