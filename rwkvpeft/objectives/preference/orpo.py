"""Odds ratio preference optimization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvpeft.objectives.preference.base import Pairwise
from rwkvpeft.objectives.preference.scores import Scores


def odds_ratio_losses(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)) of each pair, (P,), with odds(p) = p / (1 - p).

    Args:
        chosen, rejected: (P,), log p of the answers: the mean of their tokens' log-probabilities.
    Source: Hong et al., arXiv 2403.07691, equations 4 and 7. The paper's loss is the cross entropy of the chosen answer
        and lambda times this.
    """
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) for log p; at p = 1 that of the last number below, so that it and its gradient are finite."""
    # an answer that is certain has no odds; its gradient is 0 there
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    return logprobs - _log_one_minus_exp(logprobs)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0 (Maechler 2012, equation 7); each branch is given only what it can take, because the
    gradient of a branch that is not taken must not be NaN either."""
    near = x > -math.log(2)
    below, above = x.where(near, -1.0), x.where(~near, -1.0)
    return torch.where(near, torch.log(-torch.expm1(below)), torch.log1p(-torch.exp(above)))


@dataclass(frozen=True)
class Orpo(Pairwise):
    """The chosen answer's odds are to be larger than the rejected one's, without a reference; ``beta`` is the paper's
    lambda, ``sft_share`` 1 its cross entropy, here the mean over all chosen tokens of the step."""

    name: ClassVar[str] = "orpo"

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Scores) -> Tensor:
        """See ``odds_ratio_losses``."""
        return self.beta * odds_ratio_losses(chosen, rejected)
