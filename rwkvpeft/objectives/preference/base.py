"""What all losses over preferences share: read the answers, compare, count every example of the step the same.

A loss is a formula over what a model and its reference say of whole answers, and a file of its own. Letters: P prompts,
A answers to each, the chosen one first, then the rejected one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.objective import WITH_REFERENCE, ObjectiveConfig
from rwkvpeft.data.batches import PreferenceBatch
from rwkvpeft.objectives.base import Loss, Provided
from rwkvpeft.objectives.preference.scores import Scores, reference_logprobs, score_answers


class Usual(NamedTuple):
    """What an objective's settings are where none are given."""

    beta: float = 0.1
    sft_share: float = 0.0
    length_norm: bool = False


USUAL: dict[str, Usual] = {
    "dpo": Usual(),
    "ipo": Usual(),
    "wpo": Usual(),
    "kto": Usual(),
    "orpo": Usual(sft_share=1.0, length_norm=True),
    "simpo": Usual(beta=2.0, length_norm=True),
    "cpo": Usual(sft_share=1.0),
}


class Found(NamedTuple):
    """What a loss finds in a batch, without the division by the step's examples.

    ``losses`` () is their sum over the examples, ``examples`` () their number; ``figures`` are sums over them by name,
    () each, without gradient.
    """

    losses: Tensor
    examples: Tensor
    figures: dict[str, Tensor]


@dataclass(frozen=True)
class Preference(ABC):
    """A loss over prompts with a chosen and a rejected answer.

    The loss is the sum over the examples over ``normaliser[0]``, and ``sft_share`` times the chosen answers' cross
    entropy: the sum over their tokens over ``normaliser[1]``.

    Args:
        beta: how much the difference of two answers counts.
        sft_share: weight of the chosen answers' cross entropy.
        flip_share: probability that a pair is the wrong way round.
        length_norm: go by means over an answer's tokens instead of sums.
        provided: the way to log-probabilities, and the adapter that is switched off for the reference.
    """

    name: ClassVar[str]
    metric_names: ClassVar[tuple[str, ...]] = (
        "chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logprob", "rejected_logprob", "sft_loss",
    )
    """Means over the examples: rewards as the method defines them, their difference, the share of pairs whose chosen
    answer has the larger one; log-probabilities, of whole answers or with ``length_norm`` of their tokens; and the
    cross entropy of the chosen answers' tokens, with whatever weight."""
    wants_collisions: ClassVar[bool] = False

    beta: float
    sft_share: float = 0.0
    flip_share: float = 0.0
    length_norm: bool = False
    provided: Provided = field(default_factory=Provided)

    @classmethod
    def build(cls, config: TrainConfig, provided: Provided) -> Preference:
        """As the settings want it; what they leave open is as usual for the objective."""
        return cls(provided=provided, **cls.settings(config.objective))

    @classmethod
    def settings(cls, config: ObjectiveConfig) -> dict[str, Any]:
        """The fields of the class beside ``provided``."""
        usual = USUAL[cls.name]
        return {
            "beta": usual.beta if config.beta is None else config.beta,
            "sft_share": usual.sft_share if config.sft_share is None else config.sft_share,
            "flip_share": config.flip_share,
            "length_norm": usual.length_norm if config.length_norm is None else config.length_norm,
        }

    def __call__(self, model: nn.Module, batch: PreferenceBatch, normaliser: Tensor | None = None) -> Loss:
        """Read the answers and compare them.

        Args:
            normaliser: (2,), examples and chosen answers' scored tokens of the optimizer step; None is what the batch
                itself has of them, or 1.
        """
        reference = reference_logprobs(model, batch, self.provided) if self.name in WITH_REFERENCE else None
        policy = self.read(model, batch)
        if reference is not None:
            reference = reference.to(policy.logprobs)
        found = self.compare(policy, reference)
        if normaliser is None:
            normaliser = torch.stack([found.examples, policy.tokens[:, 0].sum()]).clamp(min=1)
        per_example, per_token = normaliser.to(policy.logprobs).unbind()
        figures = {name: value / per_example for name, value in found.figures.items()}
        sft_loss = -policy.logprobs[:, 0].sum() / per_token
        total = found.losses / per_example
        if self.sft_share:
            total = total + self.sft_share * sft_loss
        return Loss(total, found.examples, {**figures, "sft_loss": sft_loss.detach()})

    def read(self, model: nn.Module, batch: PreferenceBatch) -> Scores:
        """What the trained model says of the answers."""
        return score_answers(model, batch, self.provided, collision=self.wants_collisions)

    @abstractmethod
    def compare(self, policy: Scores, reference: Tensor | None) -> Found:
        """Sum up the losses of all examples.

        Args:
            reference: (P, A), sums of log-probabilities; None for a loss that compares with nothing.
        """

    def shown(self, policy: Scores) -> Tensor:
        """The log-probabilities that figures are made of, (P, A)."""
        logprobs = policy.logprobs.detach()
        return policy.means(logprobs) if self.length_norm else logprobs


@dataclass(frozen=True)
class Pairwise(Preference):
    """A loss of each pair alone. A pair that lacks a scored answer is no example."""

    def compare(self, policy: Scores, reference: Tensor | None) -> Found:
        """See ``Preference``."""
        values = policy.logprobs if reference is None else policy.logprobs - reference
        if self.length_norm:
            values = policy.means(values)
        chosen, rejected = values[:, :2].unbind(dim=1)
        pairs = policy.pairs
        losses = self.losses(chosen, rejected, policy).where(pairs, 0)
        figures = pair_figures(self.beta * values.detach(), self.shown(policy))
        sums = {name: value.where(pairs, 0).sum() for name, value in figures.items()}
        return Found(losses.sum(), pairs.sum().to(losses), sums)

    @abstractmethod
    def losses(self, chosen: Tensor, rejected: Tensor, policy: Scores) -> Tensor:
        """The loss of each pair, (P,), finite for pairs of nothing too.

        Args:
            chosen, rejected: (P,), log-probabilities of the answers, less the reference's if there is one, as means if
                the settings say so.
            policy: what else the model said of them.
        """


def pair_figures(rewards: Tensor, logprobs: Tensor) -> dict[str, Tensor]:
    """Figures of each pair by name, (P,) each, of rewards and log-probabilities (P, A)."""
    chosen, rejected = rewards[:, :2].unbind(dim=1)
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).to(rewards),
        "chosen_logprob": logprobs[:, 0],
        "rejected_logprob": logprobs[:, 1],
    }
