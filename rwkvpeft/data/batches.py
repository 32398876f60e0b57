"""What travels from the data loader to an objective.

NamedTuples, because Lightning moves them to the device with their type kept. Letters: B rows, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.ops.sequences import Sequences


class TokenBatch(NamedTuple):
    """Rows of tokens and what to learn from them.

    ``input_ids`` (B, T) int64; ``labels`` (B, T) int64, the token that follows each input; ``weights`` (B, T) fp32,
    how much each label counts, 0 where nothing is trained. ``step_weight`` () fp64 is the sum of the weights over all
    micro-batches of this rank that share one optimizer step, so that a loss can be a mean over the step's tokens.
    ``sequences`` are the documents of a packed batch, then (1, T); None where each row is one document.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    step_weight: Tensor
    sequences: Sequences | None = None

    def on(self, device: torch.device | str) -> TokenBatch:
        """The batch on a device."""
        ids, labels, weights, step_weight = (part.to(device) for part in self[:4])
        return TokenBatch(ids, labels, weights, step_weight, self.sequences)
