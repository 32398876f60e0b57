"""Predict each next token. Instruction tuning is the same objective: what is not to be learned has weight 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.objectives.base import Loss
from rwkvpeft.ops.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class LanguageModelling:
    """Mean cross entropy of the weighted tokens, with L2Wrap in the gradient (see ``ops/cross_entropy.py``).

    Args:
        logit_penalty: strength of L2Wrap; 0 for none.
        chunk_rows: rows of logits that exist at once; None is 512 on a GPU, 256 on a CPU.
    """

    logit_penalty: float = 0.0
    chunk_rows: int | None = None

    def __call__(self, model: Any, batch: TokenBatch, normaliser: Tensor | None = None) -> Loss:
        """Run the model's ``hidden`` on ``batch.input_ids`` and compare with ``batch.labels``.

        Args:
            normaliser: (), what the weighted sum of losses is divided by; None is the batch's own sum of weights,
                or 1 if nothing has weight.
        """
        hidden, _ = model.hidden(batch.input_ids)
        tokens = batch.weights.sum()
        if normaliser is None:
            normaliser = tokens.where(tokens > 0, 1.0)
        total = linear_cross_entropy(
            hidden,
            model.head.weight,
            batch.labels,
            batch.weights,
            normaliser=normaliser,
            logit_penalty=self.logit_penalty,
            chunk_rows=self.chunk_rows or (256 if hidden.device.type == "cpu" else 512),
        )
        return Loss(total, tokens, {})
