"""The loss of a margin by which the chosen answer wins, as DPO, CPO, SimPO and WPO have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rwkvpeft.config.objective import ObjectiveConfig
from rwkvpeft.objectives.preference.base import Pairwise


def margin_losses(margins: Tensor, *, flip_share: float = 0.0, hinge: bool = False) -> Tensor:
    """The losses of margins m, of their shape: -log sigmoid(m).

    Args:
        flip_share: probability e that a pair is the wrong way round: (1 - e) loss(m) + e loss(-m). Source: Mitchell, "A
            note on DPO with noisy preferences and relationship to IPO".
        hinge: max(0, 1 - m) instead. Source: SLiC, arXiv 2305.10425.
    """

    def loss(m: Tensor) -> Tensor:
        return F.relu(1 - m) if hinge else -F.logsigmoid(m)

    return (1 - flip_share) * loss(margins) + flip_share * loss(-margins) if flip_share else loss(margins)


@dataclass(frozen=True)
class ByMargin(Pairwise):
    """A loss of the margin alone, of either kind.

    Args:
        hinge: nothing is to be learned beyond a margin of 1.
    """

    hinge: bool = False

    @classmethod
    def settings(cls, config: ObjectiveConfig) -> dict[str, Any]:
        """See ``Preference``."""
        return {**super().settings(config), "hinge": config.dpo_loss == "hinge"}
