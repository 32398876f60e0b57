"""A model's own answers to prompts: drawn, judged, and written down.

Letters: P prompts, G answers to each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkvpeft.config.objective import RewardConfig
from rwkvpeft.data.batches import PromptBatch
from rwkvpeft.data.sampling import mix
from rwkvpeft.errors import ContractError
from rwkvpeft.objectives.advantages import advantages
from rwkvpeft.objectives.base import Drawn, Provided, Wanted
from rwkvpeft.objectives.reward_functions import RewardFunction
from rwkvpeft.objectives.rollouts import Rollout

_TRAINING, _EVALUATION = 0, 1


@dataclass(frozen=True)
class OwnAnswers:
    """Lets a model answer prompts and judges what it says.

    Args:
        seed: the run's. An answer's own follows from it, the prompt's place in the run and the answer's number.
        functions: judge answers; the reward of one is the sum of theirs, each times its weight.
        provided: needs ``answer``, ``record`` and ``text``.
    """

    settings: RewardConfig
    seed: int
    functions: Sequence[RewardFunction]
    provided: Provided

    def draw(self, model: Any, batch: PromptBatch, *, training: bool) -> list[Rollout]:
        """New answers of the model as it is, G to each prompt.

        Args:
            training: whether they are learned from, and logged; others have seeds of their own.
        Raises: UserError from a reward function.
        """
        provided, size = self.provided, self.settings.group_size
        if provided.answer is None or provided.record is None or provided.text is None:
            raise ContractError("own answers need something that draws them, their prompts' records and a tokenizer")
        kind = _TRAINING if training else _EVALUATION
        prompts = prompts_of(batch)
        wanted = [
            Wanted(prompt, mix(self.seed, kind, place, sample))
            for prompt, place in zip(prompts, batch.places.tolist(), strict=True)
            for sample in range(size)
        ]
        drawn = provided.answer(model, wanted)
        records = [provided.record(document) for document in batch.documents.tolist()]
        prompt_texts, texts = [provided.text(prompt) for prompt in prompts], [self._text(one) for one in drawn]
        judged = self._judge([text for text in prompt_texts for _ in range(size)], texts,
                             [record for record in records for _ in range(size)])
        rollouts = [
            Rollout(
                [list(one.tokens) for one in drawn[start : start + size]],
                [list(one.logprobs) for one in drawn[start : start + size]],
                [one.ended for one in drawn[start : start + size]],
                {name: found[start : start + size] for name, found in judged.items()},
            )
            for start in range(0, len(drawn), size)
        ]
        if training:
            self._log(batch, prompt_texts, texts, rollouts)
        return rollouts

    def rewards(self, rollouts: Sequence[Rollout]) -> Tensor:
        """What each answer is worth, (P, G) fp64: small differences of large rewards count."""
        weights = torch.tensor([function.weight for function in self.functions], dtype=torch.float64)
        return torch.stack([self.judged(rollouts, function) for function in self.functions], -1) @ weights

    @staticmethod
    def judged(rollouts: Sequence[Rollout], function: RewardFunction) -> Tensor:
        """What one function gave, not weighted, (P, G) fp64."""
        return torch.tensor([rollout.rewards[function.name] for rollout in rollouts], dtype=torch.float64)

    def _judge(
        self, prompts: Sequence[str], answers: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[float]]:
        return {function.name: function.judge(prompts, answers, records) for function in self.functions}

    def _text(self, drawn: Drawn) -> str:
        assert self.provided.text is not None
        return self.provided.text(drawn.tokens) if drawn.text is None else drawn.text

    def _log(
        self, batch: PromptBatch, prompts: Sequence[str], texts: Sequence[str], rollouts: Sequence[Rollout]
    ) -> None:
        rewards = self.rewards(rollouts)
        found = advantages(rewards, self.settings.advantage)
        size = self.settings.group_size
        for number, text in enumerate(texts):
            prompt, sample = divmod(number, size)
            rollout = rollouts[prompt]
            self.provided.log({
                "place": int(batch.places[prompt]),
                "document": int(batch.documents[prompt]),
                "prompt": prompts[prompt],
                "answer": text,
                "reward": float(rewards[prompt, sample]),
                "rewards": {name: values[sample] for name, values in rollout.rewards.items()},
                "advantage": float(found[prompt, sample]),
                "ended": rollout.ended[sample],
            })


def prompts_of(batch: PromptBatch) -> list[list[int]]:
    """The tokens of each prompt."""
    return [prompt.tolist() for prompt in batch.input_ids[0].split(batch.prompts.lengths)]
