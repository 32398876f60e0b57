"""Contrastive preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rwkvpeft.objectives.preference.margin import ByMargin, margin_losses
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
class Cpo(ByMargin):
    """The chosen answer is to be likelier than the rejected one, and likely: ``sft_share`` is its cross entropy."""

    name: ClassVar[str] = "cpo"

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Scores) -> Tensor:
        """See ``cpo_losses``."""
        return cpo_losses(chosen, rejected, beta=self.beta, flip_share=self.flip_share, hinge=self.hinge)
