"""What an objective is: a batch and a model in, a loss that adds up over tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from rwkvpeft.models.state import RecurrentState


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


class TokenObjective(Objective, Protocol):
    """An objective whose loss adds up over tokens, so that rows can be worked through in parts."""

    def part(
        self, model: nn.Module, batch: Any, normaliser: Tensor, state: RecurrentState | None = None, share: float = 1.0
    ) -> tuple[Loss, RecurrentState]:
        """What the tokens of ``batch`` add to the loss of longer rows; the parts' losses sum up to that of the rows.

        Args:
            normaliser: () of the whole rows.
            state: what the earlier tokens of the rows left behind; None at their beginning.
            share: the part of the rows' positions that is here, which counts where something is a mean over all
                positions, as L2Wrap.
        Returns: the loss, and the state after the last token.
        """
        ...
