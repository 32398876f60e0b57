"""Simple preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rwkvpeft.config.objective import ObjectiveConfig
from rwkvpeft.objectives.preference.margin import ByMargin, margin_losses
from rwkvpeft.objectives.preference.scores import Scores


def simpo_losses(
    chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float, flip_share: float = 0.0, hinge: bool = False
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma) of each pair, (P,).

    Args:
        chosen, rejected: (P,), the means of the log-probabilities of the answers' tokens.
        gamma: the margin by which the chosen answer is to win, in units of the reward.
        flip_share, hinge: see ``margin_losses``.
    Source: Meng et al., arXiv 2405.14734, equation 6.
    """
    return margin_losses(beta * (chosen - rejected) - gamma, flip_share=flip_share, hinge=hinge)


@dataclass(frozen=True)
class Simpo(ByMargin):
    """The chosen answer's tokens are to be likelier by a margin than the rejected one's, without a reference.

    Args:
        gamma: the margin.
    """

    name: ClassVar[str] = "simpo"
    gamma: float = 1.0

    @classmethod
    def settings(cls, config: ObjectiveConfig) -> dict[str, Any]:
        """See ``Preference``."""
        return {**super().settings(config), "gamma": config.simpo_gamma}

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Scores) -> Tensor:
        """See ``simpo_losses``."""
        return simpo_losses(
            chosen, rejected, beta=self.beta, gamma=self.gamma, flip_share=self.flip_share, hinge=self.hinge
        )
