"""Direct preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rwkvpeft.config.objective import ObjectiveConfig
from rwkvpeft.objectives.preference.base import Pairwise
from rwkvpeft.objectives.preference.margin import margin_losses
from rwkvpeft.objectives.preference.scores import Scores


def dpo_losses(
    chosen: Tensor, rejected: Tensor, *, beta: float, flip_share: float = 0.0, hinge: bool = False
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) of each pair, (P,).

    Args:
        chosen, rejected: (P,), log pi(y|x) - log pi_ref(y|x) of the answers.
        flip_share, hinge: see ``margin_losses``.
    Source: Rafailov et al., arXiv 2305.18290, equation 7.
    """
    return margin_losses(beta * (chosen - rejected), flip_share=flip_share, hinge=hinge)


@dataclass(frozen=True)
class Dpo(Pairwise):
    """The chosen answer is to gain more over the reference than the rejected one.

    Args:
        hinge: nothing is to be learned beyond a margin of 1.
    """

    name: ClassVar[str] = "dpo"
    hinge: bool = False

    @classmethod
    def settings(cls, config: ObjectiveConfig) -> dict[str, Any]:
        """See ``Preference``."""
        return {**super().settings(config), "hinge": config.dpo_loss == "hinge"}

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Scores) -> Tensor:
        """See ``dpo_losses``."""
        return dpo_losses(chosen, rejected, beta=self.beta, flip_share=self.flip_share, hinge=self.hinge)
