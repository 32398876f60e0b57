"""The log-probabilities that a model gives to labels, whatever its head is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rwkvpeft.models.layers import Linear
from rwkvpeft.objectives.base import Provided
from rwkvpeft.ops.token_logprobs import TokenLogprobs, token_logprobs
from rwkvpeft.quantization.linear import QuantizedLinear


def label_logprobs(
    model: Any, hidden: Tensor, labels: Tensor, weights: Tensor, provided: Provided, **asked: Any
) -> TokenLogprobs:
    """Of each label, (N,) for labels of (...); those of weight 0 are 0.

    Args:
        hidden: (..., C) after the final norm.
        weights: (...), above 0 where the label is wanted.
        asked: temperature, collision and entropy of ``token_logprobs``.
    """
    head = model.head
    if isinstance(head, Linear):
        head = head.weight
    elif isinstance(head, QuantizedLinear):
        # lives until the log-probabilities are there: the gradient of a frozen head is worked out with them
        head = head.dequantized(hidden.dtype)
    return token_logprobs(
        hidden, head, labels, weights=weights, compact=provided.compact, rows=provided.rows,
        chunk_rows=provided.chunk_rows or (256 if hidden.device.type == "cpu" else 512), **asked,
    )
