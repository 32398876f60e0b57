"""What an objective is: a batch and a model in, a loss that adds up over micro-batches out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.state import RecurrentState
from rwkvpeft.ops.cross_entropy import RowChoice
from rwkvpeft.ops.cross_entropy_torch import RowProgram


class Loss(NamedTuple):
    """What an objective found in one batch.

    ``total`` () is differentiable: the weighted sum of the tokens' losses over the normaliser. ``tokens`` () is the
    sum of the weights, so that losses of several batches are averaged by ``tokens``, never equally. ``metrics`` are
    further figures by name, () each, without gradient, over the normaliser like the loss: those of micro-batches add up
    as their losses do.
    """

    total: Tensor
    tokens: Tensor
    metrics: Mapping[str, Tensor]


class Wanted(NamedTuple):
    """An answer that is to be drawn: to which prompt's tokens, and with which seed."""

    prompt: Sequence[int]
    seed: int


class Drawn(NamedTuple):
    """An answer: its tokens, that which ends it among them; their log-probabilities at the temperature they were drawn
    with; whether it found its end; and its text, up to what ended it (None: that of all its tokens)."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    ended: bool
    text: str | None = None


@dataclass(frozen=True)
class Provided:
    """What a run hands to its objective beside its settings.

    Attributes:
        rows: what works on the loss's rows of logits, unless the head is more than a matrix.
        compact: leave out rows without weight, for which the processor waits for the device.
        chunk_rows: rows of logits that exist at once; None is 512 on a GPU, 256 on a CPU.
        adapter: what is trained on top of the base; None for full training.
        teacher: a frozen model to learn from, on the device of the trained one.
        answer: the model's own answers, in the order asked for.
        record: the record with that number in the data, which rewards look at.
        text: tokens as text.
        log: takes a line about an answer that was judged, for ``rollouts.jsonl``.
        step: optimizer steps that the run has behind it.
        folder: where answers wait that several steps learn from.
    """

    rows: RowChoice | RowProgram = "auto"
    compact: bool = True
    chunk_rows: int | None = None
    adapter: Adapter | None = None
    teacher: Rwkv | None = None
    answer: Callable[[Rwkv, Sequence[Wanted]], list[Drawn]] | None = None
    record: Callable[[int], Mapping[str, Any]] | None = None
    text: Callable[[Sequence[int]], str] | None = None
    log: Callable[[Mapping[str, Any]], None] = lambda line: None
    step: Callable[[], int] | None = None
    folder: Path | None = None


class Objective(Protocol):
    """Any loss over a batch. ``normaliser``, of the shape of the batch's ``step_weight``, replaces the batch's own sum
    of weights as the divisor, so that micro-batches of one optimizer step can share one mean.

    ``metric_names`` are those of the figures that its losses have. The classes in ``registry.OBJECTIVES`` have a class
    method ``build(config: TrainConfig, provided: Provided)``.
    """

    @property
    def metric_names(self) -> tuple[str, ...]:
        """See the class."""
        ...

    def __call__(self, model: nn.Module, batch: Any, normaliser: Tensor | None = None) -> Loss:
        """Compute the loss of ``model`` on ``batch``."""
        ...


class TokenObjective(Objective, Protocol):
    """An objective whose loss adds up over tokens, so that rows can be worked through in parts."""

    def part(
        self, model: nn.Module, batch: Any, normaliser: Tensor, state: RecurrentState | None = None, share: float = 1.0
    ) -> tuple[Loss, RecurrentState]:
        """What the tokens of ``batch`` add to the loss of longer rows; the parts' losses sum up to that of the rows.

        Args:
            normaliser: () of the whole rows.
            state: what the earlier tokens of the rows left behind; None at their beginning.
            share: the part of the rows' positions that is here, which counts where something is a mean over all
                positions, as L2Wrap.
        Returns: the loss, and the state after the last token.
        """
        ...
