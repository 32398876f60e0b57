"""Weighted preference optimization: pairs count by how likely the model is to say such answers itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rwkvpeft.objectives.preference.base import Pairwise
from rwkvpeft.objectives.preference.dpo import dpo_losses
from rwkvpeft.objectives.preference.scores import Scores


def wpo_weights(logprobs: Tensor, collisions: Tensor) -> Tensor:
    """What each pair's loss is multiplied with, (P,), at most 1 and without gradient.

    The weight of an answer is exp of the mean over its tokens of log p(y_t) - log sum_v p(v)^2: how likely its tokens
    are beside those that the model would draw. A pair has the product of both.

    Args:
        logprobs, collisions: (P, 2), means over the answers' tokens of log p(y_t) and of log sum_v p(v)^2.
    Source: Zhou et al., arXiv 2406.11827, equation 2 with "sampled alignment"; at most 1 as in their code.
    """
    return torch.exp((logprobs - collisions).detach().sum(dim=1).clamp(max=0))


@dataclass(frozen=True)
class Wpo(Pairwise):
    """DPO on answers that were not drawn from the model, weighted as if they had been."""

    name: ClassVar[str] = "wpo"
    wants_collisions: ClassVar[bool] = True

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Scores) -> Tensor:
        """See ``wpo_weights`` and ``dpo_losses``."""
        assert policy.collisions is not None
        weights = wpo_weights(policy.means(policy.logprobs[:, :2]), policy.means(policy.collisions[:, :2]))
        return weights * dpo_losses(chosen, rejected, beta=self.beta, flip_share=self.flip_share)
