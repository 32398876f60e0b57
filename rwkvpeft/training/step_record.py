"""What is known of an optimizer step when it is over."""

from __future__ import annotations

from dataclasses import dataclass, field

_SMALLEST_SHOWN = 5e-5

SHOWN_FIGURES = ("accuracy", "margin", "reward", "equal_groups", "answer_tokens")
"""Of an objective's further figures those that people are shown; the others are in the files alone."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: what ``loss_data.jsonl`` holds.

    ``loss`` is the mean over the step's tokens on all devices, ``weight`` their number (sum of weights), ``tokens``
    all positions read, padding included. ``grad_norm`` is before clipping. Either is None where it is not finite, and
    then the step was left out. ``t_cost`` is in seconds. ``metrics`` are the objective's further figures.
    """

    step: int
    epoch: int
    loss: float | None
    lr: float
    weight_decay: float
    t_cost: float
    grad_norm: float | None
    tokens: int
    weight: float
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def is_left_out(self) -> bool:
        """Whether the optimizer did not take the step."""
        return self.loss is None or self.grad_norm is None


def loss_text(loss: float) -> str:
    """A loss for people: four decimals, or its size where these would all be 0."""
    return f"{loss:.4f}" if loss == 0 or abs(loss) >= _SMALLEST_SHOWN else f"{loss:.1e}"
