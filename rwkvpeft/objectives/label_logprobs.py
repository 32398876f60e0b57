"""The log-probabilities that a model gives to labels, whatever its head is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.head import plain_weight, rows_at_once
from rwkvpeft.ops.token_logprobs import TokenLogprobs, token_logprobs


def label_logprobs(
    model: Any, hidden: Tensor, labels: Tensor, weights: Tensor, provided: Provided, **asked: Any
) -> TokenLogprobs:
    """Of each label, (N,) for labels of (...); those of weight 0 are 0.

    Args:
        hidden: (..., C) after the final norm.
        weights: (...), above 0 where the label is wanted.
        asked: temperature, collision and entropy of ``token_logprobs``.
    """
    weight = plain_weight(model.head, hidden.dtype)
    return token_logprobs(
        hidden, model.head if weight is None else weight, labels, weights=weights, compact=provided.compact,
        rows=provided.rows, chunk_rows=rows_at_once(provided.chunk_rows, hidden.device), **asked,
    )
