"""How far a loss stands out from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

KEPT_LOSSES = 100
FEWEST_LOSSES = 20

# of normal numbers, the deviation that half of them stay within is so much of the standard deviation
_HALF_WITHIN = 0.6745
# losses that hardly move would make a spike of every rise
_LEAST_DEVIATION = 0.01


def height(losses: Sequence[float], loss: float) -> float | None:
    """By how many standard deviations ``loss`` lies above the median of ``losses``; None if they are too few to tell.

    The deviation comes from the median distance to the median, which a spike among them does not move, and is at
    least a hundredth of the median.
    """
    if len(losses) < FEWEST_LOSSES:
        return None
    middle = median(losses)
    deviation = median(abs(before - middle) for before in losses) / _HALF_WITHIN
    return (loss - middle) / max(deviation, _LEAST_DEVIATION * abs(middle), 1e-9)
