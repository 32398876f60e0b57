"""How well a model predicts a data file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.language_modelling import LanguageModelling


class Evaluation(NamedTuple):
    """Mean cross entropy in nats over the weighted tokens, and the sum of their weights."""

    loss: float
    tokens: float

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(model: Rwkv, batches: Iterable[TokenBatch]) -> Evaluation:
    """Run the model over the batches; every token counts by its weight, whatever batch it is in.

    Raises: UserError if nothing has weight.
    """
    # PyTorch's rows: they need no trial, and there is no gradient that a kernel would save
    objective = LanguageModelling(logit_penalty=0.0, rows="torch")
    device = model.emb.weight.device
    one = torch.ones((), device=device)
    loss = tokens = 0.0
    for batch in batches:
        with torch.inference_mode():
            part = objective(model, batch.on(device), one)
        loss += part.total.item()
        tokens += part.tokens.item()
    if not tokens:
        raise UserError("the data hold no token to evaluate", fix="--loss_mask none")
    return Evaluation(loss / tokens, tokens)
