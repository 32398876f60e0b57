"""What is made of a step whose loss or gradient is not finite."""

from __future__ import annotations

import math
from typing import NamedTuple

from rwkvpeft.errors import UserError

# a scaler halves its scale after each overflow: from 2^16 this many in a row leave less than 2^-8
_OVERFLOWS_IN_A_ROW = 24


class StepFigures(NamedTuple):
    """One optimizer step as a guard sees it, the same on every process.

    ``step`` counts from 1; ``loss`` is the mean over its tokens, ``norm`` that of the gradients before clipping;
    ``batches`` are the numbers of its batches; ``scaled``: gradients were scaled for fp16, so that a norm that is not
    finite alone may be an overflow, which the scaler mends by itself.
    """

    step: int
    loss: float
    norm: float
    batches: range
    scaled: bool

    @property
    def is_sound(self) -> bool:
        """Whether the step could be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    @property
    def overflowed(self) -> bool:
        """Whether the scaler left the step out and tries a smaller scale."""
        return self.scaled and math.isfinite(self.loss) and not math.isfinite(self.norm)


class StepGuard:
    """Looks at every step after it was taken, or left out because it was not sound."""

    def __init__(self) -> None:
        self._overflows = 0

    def look(self, figures: StepFigures) -> None:
        """Raises: UserError if training is to end, naming the step."""
        self._overflows = self._overflows + 1 if figures.overflowed else 0
        if figures.is_sound or (figures.overflowed and self._overflows < _OVERFLOWS_IN_A_ROW):
            return
        raise UserError(
            f"training diverged at step {figures.step}",
            found=f"loss {figures.loss:g}, gradient norm {figures.norm:g}",
            expected="finite numbers",
            fix="a lower --lr_init, some --warmup_steps, or --precision bf16 or fp32; --resume auto goes on from "
            "the last saved step",
        )
