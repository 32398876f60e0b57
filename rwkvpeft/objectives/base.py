"""What an objective is: a batch and a model in, a loss that adds up over tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Loss(NamedTuple):
    """What an objective found in one batch.

    ``total`` () is differentiable: the weighted sum of the tokens' losses over the normaliser. ``tokens`` () is the
    sum of the weights, so that losses of several batches are averaged by ``tokens``, never equally. ``metrics`` are
    further figures by name, () each, without gradient.
    """

    total: Tensor
    tokens: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """Any loss over a batch. ``normaliser`` () replaces the batch's own sum of weights as the divisor, so that
    micro-batches of one optimizer step can share one mean."""

    def __call__(self, model: nn.Module, batch: Any, normaliser: Tensor | None = None) -> Loss:
        """Compute the loss of ``model`` on ``batch``."""
        ...
