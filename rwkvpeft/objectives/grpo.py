"""Learn from rewards of the model's own answers: group relative policy optimisation and its relatives.

Each prompt is answered several times by the model as it is; functions of the user judge the answers; and the answers
that were better than the others to their prompt become likelier. Advantages are those of ``advantages.py``, the loss
that of ``policy_loss.py``. The probabilities that a ratio compares with are those that the training itself computes
in the first step that learns from an answer: there the ratio is exactly 1, whatever the drawing rounds.

Letters: P prompts, G answers to each, T tokens of all answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.objective import RewardConfig
from rwkvpeft.data.batches import PromptBatch
from rwkvpeft.errors import ContractError
from rwkvpeft.objectives.advantages import advantages, equal_groups
from rwkvpeft.objectives.answers import evaluating, read_answers
from rwkvpeft.objectives.base import Loss, Provided
from rwkvpeft.objectives.label_logprobs import label_logprobs
from rwkvpeft.objectives.own_answers import OwnAnswers, prompts_of
from rwkvpeft.objectives.policy_loss import Groups, PolicyLoss, Probabilities
from rwkvpeft.objectives.reward_functions import load_rewards
from rwkvpeft.objectives.rollouts import KeptRollouts, Rollout
from rwkvpeft.ops.sequences import Sequences


class _Packed(NamedTuple):
    """Prompts without their last tokens, (1, S), and their answers, each behind that token, (1, T), with what follows
    each of these."""

    shared_ids: Tensor
    shared: Sequences
    input_ids: Tensor
    labels: Tensor
    answers: Sequences


@dataclass(frozen=True)
class Grpo:
    """The loss of a policy gradient with a clipped ratio, over answers that the model has drawn itself.

    Without gradient, in an evaluation, the loss is minus the mean reward, of answers whose seeds are always the same.

    Args:
        provided: with ``kl_beta`` its adapter is what is switched off.
        kept: answers that further steps learn from; None where each step draws its own.
    """

    settings: RewardConfig
    own: OwnAnswers
    provided: Provided
    kept: KeptRollouts | None = None

    @classmethod
    def build(cls, config: TrainConfig, provided: Provided) -> Grpo:
        """As the settings want it. Raises: UserError for a reward function that cannot be found."""
        settings, kept = config.rewards, None
        if settings.policy_steps > 1:
            if provided.folder is None or provided.step is None:
                raise ContractError("several steps with the same answers need a folder, and the number of the step")
            kept = KeptRollouts(provided.folder, settings.policy_steps)
        if settings.kl_beta and provided.adapter is None:
            raise ContractError("the divergence from the base needs an adapter that can be switched off")
        own = OwnAnswers(settings, config.runtime.random_seed, load_rewards(settings.reward), provided)
        return cls(settings, own, provided, kept)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Means over prompts; of ``entropy``, ``sampling_gap``, ``clipped`` and ``kl`` over the tokens of a group.

        ``entropy`` is the mean of minus the log-probability of what was drawn, ``sampling_gap`` that of the distance
        between log-probabilities of drawing and of training.
        """
        several = self.own.functions if len(self.own.functions) > 1 else []
        names = ["reward", *(f"reward_{function.name}" for function in several), "reward_std"]
        names += ["equal_groups", "answer_tokens", "ended", "entropy"]
        # that between a probability of an earlier step and this one's would say nothing
        names += ["sampling_gap"] if self.kept is None else ["clipped"]
        return (*names, "kl") if self.settings.kl_beta else tuple(names)

    def __call__(self, model: Any, batch: PromptBatch, normaliser: Tensor | None = None) -> Loss:
        """See ``Objective``; ``normaliser`` () is a number of prompts."""
        training, device = torch.is_grad_enabled(), batch.input_ids.device
        count = torch.tensor(float(len(batch.prompts.lengths)), device=device)
        rollouts = self._earlier(batch) if training else None
        is_new = rollouts is None
        if rollouts is None:
            rollouts = self.own.draw(model, batch, training=training)
        packed = _pack(batch, rollouts)
        groups = Groups(torch.tensor(packed.answers.lengths, device=device), self.settings.group_size)
        logprobs = self._probabilities(model, packed, rollouts)
        if is_new and training:
            self._keep(batch, rollouts, logprobs.old)
        rewards = self.own.rewards(rollouts)
        found = advantages(rewards, self.settings.advantage).to(device=device, dtype=logprobs.new.dtype)
        loss = PolicyLoss(self.settings)(logprobs, found, self._learned_from(rollouts).to(device), groups)
        figures = self._figures(rollouts, rewards) | {
            "entropy": groups.means(-logprobs.new.detach()),
            "sampling_gap": groups.means((logprobs.old - _flat(_sampled(rollouts), logprobs.old)).abs()),
            "clipped": loss.clipped,
        }
        if loss.divergence is not None:
            figures["kl"] = loss.divergence
        total = loss.total if training else -figures["reward"].sum().to(device=device, dtype=loss.total.dtype)
        divisor = count if normaliser is None else normaliser
        sums = {name: figures[name].sum().to(device=device, dtype=torch.float32) for name in self.metric_names}
        return Loss(total / divisor, count, {name: value / divisor for name, value in sums.items()})

    def _earlier(self, batch: PromptBatch) -> list[Rollout] | None:
        return None if self.kept is None else self.kept.find(batch.places.tolist(), self._step())

    def _keep(self, batch: PromptBatch, rollouts: Sequence[Rollout], old: Tensor) -> None:
        if self.kept is None:
            return
        lengths = [len(answer) for rollout in rollouts for answer in rollout.answers]
        parts, size = [part.tolist() for part in old.split(lengths)], self.settings.group_size
        whole = [replace(one, old=parts[i * size : (i + 1) * size]) for i, one in enumerate(rollouts)]
        self.kept.keep(batch.places.tolist(), self._step(), whole)

    def _step(self) -> int:
        assert self.provided.step is not None
        return self.provided.step()

    def _learned_from(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(P, G) bool."""
        ended = torch.tensor([rollout.ended for rollout in rollouts])
        return ended if self.settings.overlong == "mask" else torch.ones_like(ended)

    def _probabilities(self, model: Any, packed: _Packed, rollouts: Sequence[Rollout]) -> Probabilities:
        reference = None
        if self.settings.kl_beta:
            assert self.provided.adapter is not None
            # before the trained model reads: what that keeps for its backward pass must not be exchanged in between
            with torch.no_grad(), evaluating(model), self.provided.adapter.disabled(model):
                reference = self._logprobs(model, packed)
        new = self._logprobs(model, packed)
        before = [answer for rollout in rollouts for answer in rollout.old]
        return Probabilities(new, _flat(before, new) if before else new.detach(), reference)

    def _logprobs(self, model: Any, packed: _Packed) -> Tensor:
        """Log-probabilities of the answers' tokens at the temperature they are drawn with, (T,)."""
        hidden = read_answers(model, packed.shared_ids, packed.shared, packed.input_ids, packed.answers)
        weights = torch.ones_like(packed.labels, dtype=torch.float32)
        temperature = self.settings.answer_temperature
        return label_logprobs(model, hidden, packed.labels, weights, self.provided, temperature=temperature).logprobs

    def _figures(self, rollouts: Sequence[Rollout], rewards: Tensor) -> dict[str, Tensor]:
        """What is known of each prompt's answers without the model, (P,) fp64 each."""
        lengths = [[len(answer) for answer in rollout.answers] for rollout in rollouts]
        figures = {
            "reward": rewards.mean(1),
            "reward_std": rewards.std(1),
            "equal_groups": equal_groups(rewards).double(),
            "answer_tokens": torch.tensor(lengths).double().mean(1),
            "ended": torch.tensor([rollout.ended for rollout in rollouts]).double().mean(1),
        }
        for function in self.own.functions:
            figures[f"reward_{function.name}"] = self.own.judged(rollouts, function).mean(1)
        return figures


def _pack(batch: PromptBatch, rollouts: Sequence[Rollout]) -> _Packed:
    device = batch.input_ids.device
    prompts = prompts_of(batch)
    pairs = [(prompt, answer) for prompt, one in zip(prompts, rollouts, strict=True) for answer in one.answers]

    def row(parts: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[token for part in parts for token in part]], dtype=torch.int64, device=device)

    return _Packed(
        row([prompt[:-1] for prompt in prompts]),
        Sequences([len(prompt) - 1 for prompt in prompts]),
        row([[prompt[-1], *answer[:-1]] for prompt, answer in pairs]),
        row([answer for _, answer in pairs]),
        Sequences([len(answer) for _, answer in pairs]),
    )


def _sampled(rollouts: Sequence[Rollout]) -> list[Sequence[float]]:
    return [answer for rollout in rollouts for answer in rollout.sampled]


def _flat(answers: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """A number for each token as (T,)."""
    return torch.tensor([x for answer in answers for x in answer], dtype=like.dtype, device=like.device)
