"""Predict each next token. Instruction tuning is the same objective: what is not to be learned has weight 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.models.state import RecurrentState
from rwkvpeft.objectives.base import Loss, Objective, Provided
from rwkvpeft.objectives.head import plain_weight, rows_at_once
from rwkvpeft.objectives.long_context import in_chunks
from rwkvpeft.ops.cross_entropy import RowChoice, head_cross_entropy, linear_cross_entropy
from rwkvpeft.ops.cross_entropy_torch import RowProgram


@dataclass(frozen=True)
class LanguageModelling:
    """Mean cross entropy of the weighted tokens, with L2Wrap in the gradient (see ``ops/cross_entropy.py``).

    Args:
        logit_penalty: strength of L2Wrap; 0 for none.
        chunk_rows: rows of logits that exist at once; None is 512 on a GPU, 256 on a CPU.
        compact: leave out rows without weight, for which the processor waits for the device.
        rows: what works on rows of logits, unless the head is more than a matrix.
        label_smoothing: share of each target that is spread over the whole vocabulary.
        tells_lengths: tell the model how long each row's document is, which NEFTune's noise depends on.
    """

    metric_names: ClassVar[tuple[str, ...]] = ()

    logit_penalty: float = 0.0
    chunk_rows: int | None = None
    compact: bool = True
    rows: RowChoice | RowProgram = "auto"
    label_smoothing: float = 0.0
    tells_lengths: bool = False

    @classmethod
    def build(cls, config: TrainConfig, provided: Provided) -> Objective:
        """As the settings want it, in chunks of rows if they say so."""
        return in_chunks(cls.build_part(config, provided), config)

    @classmethod
    def build_part(cls, config: TrainConfig, provided: Provided) -> LanguageModelling:
        """As the settings want it, whole rows or a chunk of them at a time."""
        return cls(
            config.optimizer.logit_penalty,
            provided.chunk_rows,
            compact=provided.compact,
            rows=provided.rows,
            label_smoothing=config.method.label_smoothing,
            tells_lengths=config.method.neftune_alpha > 0,
        )

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
        told = {"lengths": document_lengths(batch, share)} if self.tells_lengths else {}
        hidden, after = model.hidden(batch.input_ids, state, sequences=batch.sequences, **told)
        settings: dict[str, Any] = {
            "normaliser": normaliser,
            # a mean over all positions, of which there are fewer here
            "logit_penalty": self.logit_penalty * share,
            "label_smoothing": self.label_smoothing,
            "compact": self.compact,
            "chunk_rows": rows_at_once(self.chunk_rows, hidden.device),
        }
        head, copies = model.head, None
        if getattr(model, "head_q", None) is not None:
            copies = model.copies(hidden, batch.input_ids, state, batch.sequences)
        # a dequantised head lives until the loss is there: its gradients are worked out with it
        weight = plain_weight(head, hidden.dtype) if copies is None else None
        if weight is not None:
            total = linear_cross_entropy(hidden, weight, batch.labels, batch.weights, rows=self.rows, **settings)
        else:
            beside = None if copies is None else copies.add
            total = head_cross_entropy(hidden, head, batch.labels, batch.weights, beside=beside, **settings)
        return Loss(total, batch.weights.sum(), {}), after


def document_lengths(batch: TokenBatch, share: float = 1.0) -> Tensor | None:
    """How far each row's document is read, (B,): up to its last trained token, so that padding does not count.

    Args:
        share: the part of the rows' positions that is here; of a part, all that is known is how long the rows are.
    Returns: None for a packed row, whose documents have the lengths of ``batch.sequences``.
    """
    if batch.sequences is not None:
        return None
    rows, tokens = batch.weights.shape
    if share < 1:
        return torch.full((rows,), round(tokens / share), device=batch.weights.device)
    places = torch.arange(1, tokens + 1, device=batch.weights.device)
    return torch.where(batch.weights != 0, places, 1).amax(dim=1)
