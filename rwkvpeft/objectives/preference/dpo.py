"""Direct preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rwkvpeft.objectives.preference.margin import ByMargin, margin_losses
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
class Dpo(ByMargin):
    """The chosen answer is to gain more over the reference than the rejected one."""

    name: ClassVar[str] = "dpo"

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Scores) -> Tensor:
        """See ``dpo_losses``."""
        return dpo_losses(chosen, rejected, beta=self.beta, flip_share=self.flip_share, hinge=self.hinge)
