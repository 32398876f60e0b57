"""Identity preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rwkvpeft.objectives.preference.base import Pairwise
from rwkvpeft.objectives.preference.scores import Scores


def ipo_losses(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(chosen - rejected - 1 / (2 beta))^2 of each pair, (P,).

    Args:
        chosen, rejected: (P,), log pi(y|x) - log pi_ref(y|x) of the answers; their means over the tokens make the
            variant that trl has.
        beta: the paper's tau.
    Source: Azar et al., arXiv 2310.12036, equation 17.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class Ipo(Pairwise):
    """The chosen answer is to gain a certain amount more over the reference than the rejected one, and no more."""

    name: ClassVar[str] = "ipo"

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Scores) -> Tensor:
        """See ``ipo_losses``."""
        return ipo_losses(chosen, rejected, beta=self.beta)
