"""Predict each next token. Instruction tuning is the same objective: what is not to be learned has weight 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.models.layers import Linear
from rwkvpeft.models.state import RecurrentState
from rwkvpeft.objectives.base import Loss
from rwkvpeft.ops.cross_entropy import RowChoice, head_cross_entropy, linear_cross_entropy
from rwkvpeft.ops.cross_entropy_torch import RowProgram
from rwkvpeft.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class LanguageModelling:
    """Mean cross entropy of the weighted tokens, with L2Wrap in the gradient (see ``ops/cross_entropy.py``).

    Args:
        logit_penalty: strength of L2Wrap; 0 for none.
        chunk_rows: rows of logits that exist at once; None is 512 on a GPU, 256 on a CPU.
        compact: leave out rows without weight, for which the processor waits for the device.
        rows: what works on rows of logits, unless the head is more than a matrix.
    """

    logit_penalty: float = 0.0
    chunk_rows: int | None = None
    compact: bool = True
    rows: RowChoice | RowProgram = "auto"

    def __call__(self, model: Any, batch: TokenBatch, normaliser: Tensor | None = None) -> Loss:
        """Run the model's ``hidden`` on ``batch.input_ids`` and compare with ``batch.labels``.

        Args:
            normaliser: (), what the weighted sum of losses is divided by; None is the batch's own sum of weights,
                or 1 if nothing has weight.
        """
        if normaliser is None:
            tokens = batch.weights.sum()
            normaliser = tokens.where(tokens > 0, 1.0)
        return self.part(model, batch, normaliser)[0]

    def part(
        self, model: Any, batch: TokenBatch, normaliser: Tensor, state: RecurrentState | None = None, share: float = 1.0
    ) -> tuple[Loss, RecurrentState]:
        """See ``TokenObjective``."""
        hidden, after = model.hidden(batch.input_ids, state, sequences=batch.sequences)
        settings: dict[str, Any] = {
            "normaliser": normaliser,
            # a mean over all positions, of which there are fewer here
            "logit_penalty": self.logit_penalty * share,
            "compact": self.compact,
            "chunk_rows": self.chunk_rows or (256 if hidden.device.type == "cpu" else 512),
        }
        head = model.head
        if isinstance(head, Linear | QuantizedLinear):
            # a dequantised head lives until the loss is there: its gradients are worked out with it
            weight = head.weight if isinstance(head, Linear) else head.dequantized(hidden.dtype)
            total = linear_cross_entropy(hidden, weight, batch.labels, batch.weights, rows=self.rows, **settings)
        else:
            total = head_cross_entropy(hidden, head, batch.labels, batch.weights, **settings)
        return Loss(total, batch.weights.sum(), {}), after
