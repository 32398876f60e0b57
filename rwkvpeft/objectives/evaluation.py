"""How well a model predicts a data file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.base import Objective
from rwkvpeft.objectives.language_modelling import LanguageModelling


class Evaluation(NamedTuple):
    """Mean cross entropy in nats over the weighted tokens, and the sum of their weights."""

    loss: float
    tokens: float

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(model: Rwkv, batches: Iterable[TokenBatch], *, chunk: int | None = None) -> Evaluation:
    """Run the model over the batches; every token counts by its weight, whatever batch it is in.

    Args:
        chunk: tokens of a row that are worked on at once, the state being handed on, so that rows of any length take
            the memory of one chunk; None for whole rows. Packed rows are not cut.
    Raises: UserError if nothing has weight.
    """
    loss, tokens = add_up(model, batches, chunk=chunk)
    return mean_of(loss, tokens)


def add_up(model: Rwkv, batches: Iterable[TokenBatch], *, chunk: int | None = None) -> tuple[float, float]:
    """The weighted sum of the tokens' losses, and the sum of their weights, so that several devices can share the
    work. Arguments as of ``evaluate``."""
    # PyTorch's rows: they need no trial, and there is no gradient that a kernel would save
    objective = LanguageModelling(logit_penalty=0.0, rows="torch")
    device = model.emb.weight.device
    one = torch.ones((), device=device)
    loss = tokens = 0.0
    for batch in batches:
        # not inference mode, whose tensors could stay in a cache that training reads
        with torch.no_grad():
            total, weight = _run(model, objective, batch.on(device), one, chunk)
        loss += total.item()
        tokens += weight.item()
    return loss, tokens


def add_up_own(model: Rwkv, batches: Iterable[Any], objective: Objective, whole: Tensor) -> dict[str, float]:
    """What an objective that is not of single tokens finds: its loss and its figures, as "loss" and by their names.

    Args:
        whole: the step weight of all that is evaluated, by all devices. What the devices find adds up to the figures of
            one batch of everything, however it is cut into batches.
    """
    device = model.emb.weight.device
    normaliser = whole.where(whole > 0, 1.0).to(device, torch.float32)
    sums = dict.fromkeys(("loss", *objective.metric_names), 0.0)
    for batch in batches:
        with torch.no_grad():
            loss = objective(model, batch.on(device), normaliser)
        for name, value in {"loss": loss.total, **loss.metrics}.items():
            sums[name] += value.item()
    return sums


def mean_of(loss: float, tokens: float) -> Evaluation:
    """The mean of what ``add_up`` found. Raises: UserError if nothing has weight."""
    if not tokens:
        raise UserError("the data hold no token to evaluate", fix="--loss_mask none")
    return Evaluation(loss / tokens, tokens)


def _run(
    model: Rwkv, objective: LanguageModelling, batch: TokenBatch, one: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor]:
    total = torch.zeros((), dtype=torch.float32, device=one.device)
    state = None
    for part in _parts(batch, chunk):
        loss, state = objective.part(model, part, one, state)
        total = total + loss.total
    return total, batch.weights.sum()


def _parts(batch: TokenBatch, chunk: int | None) -> Iterator[TokenBatch]:
    whole = chunk is None or chunk >= batch.input_ids.shape[1] or batch.sequences is not None
    return iter([batch]) if whole else batch.cut(chunk or 1)
