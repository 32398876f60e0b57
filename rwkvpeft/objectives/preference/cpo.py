"""Contrastive preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rwkvpeft.config.objective import ObjectiveConfig
from rwkvpeft.objectives.preference.base import Pairwise
from rwkvpeft.objectives.preference.margin import margin_losses
from rwkvpeft.objectives.preference.scores import Scores


def cpo_losses(
    chosen: Tensor, rejected: Tensor, *, beta: float, flip_share: float = 0.0, hinge: bool = False
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) of each pair, (P,): DPO with a reference that finds all answers alike.

    Args:
        chosen, rejected: (P,), log pi(y|x) of the answers.
        flip_share, hinge: see ``margin_losses``.
    Source: Xu et al., arXiv 2401.08417, equation 3; the method's other term is the cross entropy of the chosen answer.
    """
    return margin_losses(beta * (chosen - rejected), flip_share=flip_share, hinge=hinge)


@dataclass(frozen=True)
class Cpo(Pairwise):
    """The chosen answer is to be likelier than the rejected one, and likely: ``sft_share`` is its cross entropy.

    Args:
        hinge: nothing is to be learned beyond a margin of 1.
    """

    name: ClassVar[str] = "cpo"
    hinge: bool = False

    @classmethod
    def settings(cls, config: ObjectiveConfig) -> dict[str, Any]:
        """See ``Preference``."""
        return {**super().settings(config), "hinge": config.dpo_loss == "hinge"}

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Scores) -> Tensor:
        """See ``cpo_losses``."""
        return cpo_losses(chosen, rejected, beta=self.beta, flip_share=self.flip_share, hinge=self.hinge)
