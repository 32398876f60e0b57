"""What the tokens of a model's own answers add to the loss, by how good each answer was.

With the ratio q = p_new / p_old of a token's probabilities, the advantage A of its answer and a reference p_ref::

    loss_token = - min(q A, clip(q, 1 - clip_low, 1 + clip_high) A)  +  kl_beta k,
    k = p_ref / p_new - log(p_ref / p_new) - 1

and the tokens of a group of G answers with |o_i| tokens are weighed by ::

    grpo     1 / (G |o_i|)           DeepSeekMath, arXiv 2402.03300, equation 3
    dapo     1 / sum_i |o_i|         DAPO, arXiv 2503.14476, equation 8
    dr_grpo  1 / (G answer_tokens)   Dr. GRPO, arXiv 2503.20783, section 3.2 (the constant is that of its program)

A group's loss depends on no other group, so that those of prompts add up. k is Schulman's third estimator of the
divergence. Letters: P prompts, G answers to each, T tokens of all answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.config.objective import RewardConfig


class Groups:
    """Which answer each token belongs to.

    Args:
        lengths: tokens of each of the P * G answers, those to one prompt behind another, (P * G,).
        size: G.
    """

    def __init__(self, lengths: Tensor, size: int) -> None:
        self.lengths = lengths
        self.size = size
        self._answer = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def to_tokens(self, values: Tensor) -> Tensor:
        """A value for each answer (P * G,) as one for each token (T,)."""
        return values[self._answer]

    def means(self, values: Tensor) -> Tensor:
        """The mean of a value for each token (T,) over the tokens of each group, (P,)."""
        sums = torch.zeros(len(self.lengths), dtype=values.dtype, device=values.device)
        sums = sums.index_put((self._answer,), values, accumulate=True)
        return sums.view(-1, self.size).sum(1) / self.lengths.view(-1, self.size).sum(1)


class Probabilities(NamedTuple):
    """Log-probabilities of the drawn tokens, (T,) each: differentiable ones of the model, those of the model that drew
    them, and those of the reference if it counts."""

    new: Tensor
    old: Tensor
    reference: Tensor | None = None


class Found(NamedTuple):
    """The sum of the groups' losses (), differentiable; of each group, (P,), the share of tokens whose ratio is
    clipped, and the mean divergence from the reference."""

    total: Tensor
    clipped: Tensor
    divergence: Tensor | None


@dataclass(frozen=True)
class PolicyLoss:
    """See the module."""

    settings: RewardConfig

    def __call__(self, logprobs: Probabilities, advantages: Tensor, kept: Tensor, groups: Groups) -> Found:
        """The loss of groups of answers.

        Args:
            advantages: (P, G).
            kept: (P, G) bool, answers that are learned from.
        """
        settings = self.settings
        advantage = groups.to_tokens(advantages.flatten())
        ratio = (logprobs.new - logprobs.old).exp()
        bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        # where both are equal the gradient is that of the ratio, as inside the bounds
        is_clipped = bounded * advantage < ratio * advantage
        each = -torch.where(is_clipped, bounded.detach() * advantage, ratio * advantage)
        divergence = None
        if logprobs.reference is not None:
            above = logprobs.reference - logprobs.new
            # exp(x) - 1 - x of a small x is nothing but rounding, if it is not expm1
            divergence = torch.expm1(above) - above
            each = each + settings.kl_beta * divergence
        weights = groups.to_tokens(self.weights(kept, groups, each.dtype))
        return Found(
            (each * weights).sum(),
            groups.means(is_clipped.to(each.dtype)),
            None if divergence is None else groups.means(divergence.detach()),
        )

    def weights(self, kept: Tensor, groups: Groups, dtype: torch.dtype = torch.float32) -> Tensor:
        """What each token of an answer counts, (P * G,); 0 in answers that are not learned from."""
        lengths = groups.lengths.view_as(kept).to(dtype)
        if self.settings.answer_mean == "grpo":
            counted = 1 / (groups.size * lengths)
        elif self.settings.answer_mean == "dapo":
            counted = (1 / (lengths * kept).sum(1, keepdim=True).clamp(min=1)).expand_as(lengths)
        else:
            counted = torch.full_like(lengths, 1 / (groups.size * self.settings.answer_tokens))
        return (counted * kept).flatten()
