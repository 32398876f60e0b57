"""Kahneman-Tversky optimization: answers that are wanted and answers that are not, which need not be pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkvpeft.config.objective import ObjectiveConfig
from rwkvpeft.data.batches import PreferenceBatch
from rwkvpeft.objectives.answers import evaluating
from rwkvpeft.objectives.preference.base import Found, Preference, pair_figures
from rwkvpeft.objectives.preference.scores import Scores, score_answers, some_answers


def kto_losses(
    ratios: Tensor, kl: Tensor, *, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> Tensor:
    """The loss of each answer, (P, 2): desirable (1 - sigmoid(beta (r - kl))) of the wanted ones in the first column,
    undesirable (1 - sigmoid(beta (kl - r))) of the others.

    Args:
        ratios: (P, 2), r = log pi(y|x) - log pi_ref(y|x).
        kl: (), see ``kto_kl``.
        desirable, undesirable: the paper's lambda_D and lambda_U.
    Source: Ethayarajh et al., arXiv 2402.01306, equations 7 and 8.
    """
    gains = beta * (ratios - kl)
    # 1 - sigmoid(x) is sigmoid(-x), without the difference of rounded numbers
    wanted, unwanted = torch.sigmoid(-gains[:, 0]), torch.sigmoid(gains[:, 1])
    return torch.stack([desirable * wanted, undesirable * unwanted], dim=1)


def kto_kl(ratios: Tensor, present: Tensor) -> Tensor:
    """How far the model has moved from the reference, (), without gradient: the mean of log pi(y'|x) - log pi_ref(y'|x)
    over answers y' to other prompts, at least 0.

    Args:
        ratios, present: (P,), and which of them are there.
    Source: arXiv 2402.01306, its estimate of z_0: biased but cheap, over the answers that are read at once.
    """
    mean = ratios.where(present, 0).sum() / present.sum().clamp(min=1)
    return mean.clamp(min=0).detach()


@dataclass(frozen=True)
class Kto(Preference):
    """Wanted answers are to gain over the reference by more than any answer does, others by less.

    The third answer to each prompt belongs to another prompt, and is read for ``kl`` alone, without gradient. An
    example is an answer. The figures of wanted and of other answers are over half of all answers: means where as many
    are wanted as not. ``accuracy`` is over all answers: in a pair as of DPO, otherwise whether the reward is on the
    right side of ``beta * kl``. ``kl`` is its mean over the step's batches, each by its answers.

    Args:
        desirable, undesirable: weights of answers that are wanted, and that are not.
    """

    name: ClassVar[str] = "kto"
    metric_names: ClassVar[tuple[str, ...]] = (*Preference.metric_names, "kl")
    desirable: float = 1.0
    undesirable: float = 1.0

    @classmethod
    def settings(cls, config: ObjectiveConfig) -> dict[str, Any]:
        """See ``Preference``."""
        weights = {"desirable": config.kto_desirable, "undesirable": config.kto_undesirable}
        return {**super().settings(config), **weights}

    def read(self, model: nn.Module, batch: PreferenceBatch) -> Scores:
        """What the trained model says; answers to other prompts are no part of the backward pass."""
        with torch.no_grad(), evaluating(model):
            others = score_answers(model, some_answers(batch, 2, 3), self.provided)
        own = score_answers(model, some_answers(batch, 0, 2), self.provided)
        return Scores(torch.cat([own.logprobs, others.logprobs], 1), torch.cat([own.tokens, others.tokens], 1))

    def compare(self, policy: Scores, reference: Tensor | None) -> Found:
        """See ``kto_losses``."""
        assert reference is not None
        ratios = policy.logprobs - reference
        if self.length_norm:
            ratios = policy.means(ratios)
        present = policy.tokens > 0
        kl = kto_kl(ratios[:, 2], present[:, 2])
        weights = {"desirable": self.desirable, "undesirable": self.undesirable}
        losses = kto_losses(ratios[:, :2], kl, beta=self.beta, **weights).where(present[:, :2], 0)
        examples = present[:, :2].sum().to(losses)
        figures = self._figures(ratios.detach(), policy, kl)
        return Found(losses.sum(), examples, {**figures, "kl": kl * examples})

    def _figures(self, ratios: Tensor, policy: Scores, kl: Tensor) -> dict[str, Tensor]:
        present = policy.tokens[:, :2] > 0
        rewards = self.beta * ratios[:, :2].where(present, 0)
        right = torch.stack([rewards[:, 0] > self.beta * kl, rewards[:, 1] < self.beta * kl], dim=1)
        figures = pair_figures(rewards, self.shown(policy))
        in_order = figures.pop("accuracy")[:, None] > 0
        right = torch.where(policy.pairs[:, None], in_order, right) & present
        return {name: 2 * x.sum() for name, x in figures.items()} | {"accuracy": right.sum().to(rewards)}
