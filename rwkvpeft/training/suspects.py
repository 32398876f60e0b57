"""What a broken step or a spike may come from: documents, gradients, weights, the course of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.evaluation import add_up
from rwkvpeft.training.resting import at_rest
from rwkvpeft.training.strategies.contract import Sharing

_TREND_LOSSES = 50
_RISE = 0.05
# more take longer than what they tell is worth
_MOST_EVALUATED = 256
_STEPS_BETWEEN = 50


SHOWN = 3
"""Documents and tensors that a line for people names."""


def shortened(names: Sequence[str]) -> str:
    """The first names, and how many there are besides."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


class Suspects:
    """Looks into a step that has just been taken or left out.

    Args:
        model: as it is after the step.
        chunk: tokens of a row that are worked on at once; None for whole rows.
    """

    def __init__(
        self, model: Rwkv, data: TrainingData, sharing: Sharing, *, chunk: int | None, seed: int
    ) -> None:
        self._model = model
        self._data = data
        self._sharing = sharing
        self._chunk = chunk
        self._seed = seed
        self._evaluated: int | None = None

    def documents(self, batches: range) -> list[str]:
        """The documents of these batches on all processes."""
        return self._data.labels(batches)

    def losses(self, step: int, batches: range) -> list[float | None]:
        """Each document's own mean loss, None where nothing of it is trained or the loss is not finite; nothing where
        that would cost too much, or was done a few steps ago. Collective."""
        before, self._evaluated = self._evaluated, step
        if before is not None and step - before < _STEPS_BETWEEN:
            self._evaluated = before
            return []
        if len(self.documents(batches)) > _MOST_EVALUATED:
            return []
        trainer = self._data.trainer
        assert trainer is not None
        if not trainer.is_global_zero and not self._sharing.splits_weights:
            return []
        with at_rest(self._model, self._seed):
            return [
                self._sharing.run(trainer, partial(self._loss, batch)) for _, batch in self._data.documents(batches)
            ]

    def _loss(self, batch: TokenBatch) -> float | None:
        loss, tokens = add_up(self._model, [batch], chunk=self._chunk)
        mean = loss / tokens if tokens else math.nan
        return round(mean, 4) if math.isfinite(mean) else None

    def _not_finite(self, tensors: Mapping[str, Tensor | None]) -> list[str]:
        """Those that are not on some process, whichever part of them it holds. Collective."""
        trainer = self._data.trainer
        assert trainer is not None
        parts = [None if tensor is None else self._sharing.part(tensor) for tensor in tensors.values()]
        broken = [part is not None and not bool(torch.isfinite(part).all()) for part in parts]
        here = torch.tensor(broken, dtype=torch.float32, device=trainer.strategy.root_device)
        counts = trainer.strategy.reduce(here, reduce_op="sum")
        return [name for name, count in zip(tensors, counts.tolist(), strict=True) if count]

    def diagnosis(
        self, step: int, *, found: str, in_a_row: int, documents: Sequence[str], losses: Sequence[float]
    ) -> UserError:
        """The error that ends a run whose steps cannot be taken. Collective.

        Args:
            found: the figures of the step.
            in_a_row: broken steps, of which this is the last.
            documents: of the step.
            losses: of the last steps that were taken.
        """
        named = dict(self._model.named_parameters())
        weights = self._not_finite(named)
        gradients = self._not_finite({name: weight.grad for name, weight in named.items()})
        course, rises = _course(losses)
        count = f", {in_a_row} steps in a row" if in_a_row > 1 else ""
        parts = [
            found,
            f"weights not finite: {shortened(weights)}" if weights else "all weights are finite",
            f"gradients not finite: {shortened(gradients)}" if gradients else "",
            course,
            f"the step held {shortened(documents)}",
        ]
        return UserError(
            f"training diverged at step {step}{count}",
            found="; ".join(part for part in parts if part),
            expected="finite numbers",
            fix=_fix(bool(weights), rises),
        )


def _course(losses: Sequence[float]) -> tuple[str, bool]:
    """How the loss went before, for people, and whether it rose."""
    last = losses[-_TREND_LOSSES:]
    if len(last) < 4:
        return "", False
    half = len(last) // 2
    before, after = fmean(last[:half]), fmean(last[half:])
    rises = after > before * (1 + _RISE)
    word = "rose" if rises else "fell" if after < before else "hardly moved"
    return f"the loss {word} over the {len(last)} steps before, from {before:.4f} to {after:.4f}", rises


def _fix(weights_broken: bool, rises: bool) -> str:
    if weights_broken:
        what = "another --load_model or --adapter if this was its first step"
    elif rises:
        what = "a lower --lr_init, or more --warmup_steps"
    else:
        what = "to look at these documents, a lower --lr_init, or some --warmup_steps"
    return f"{what}, or --precision bf16 or fp32; --resume auto goes on from the last saved step, which is whole"
