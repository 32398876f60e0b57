"""What travels from the data loader to an objective.

NamedTuples, because Lightning moves them to the device with their type kept. Letters: B rows, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenBatch(NamedTuple):
    """Rows of tokens and what to learn from them.

    ``input_ids`` (B, T) int64; ``labels`` (B, T) int64, the token that follows each input; ``weights`` (B, T) fp32,
    how much each label counts, 0 where nothing is trained. ``step_weight`` () fp64 is the sum of the weights over all
    micro-batches of this rank that share one optimizer step, so that a loss can be a mean over the step's tokens.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    step_weight: Tensor
