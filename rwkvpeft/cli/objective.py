"""What a run hands to its objective: a teacher, a reference, answers of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.prompt_rows import MixedPrompts, PromptRows, record_of
from rwkvpeft.data.rows import RowDataset
from rwkvpeft.data.text import data_tokenizer
from rwkvpeft.generation.batched import Request, decode
from rwkvpeft.generation.chat import STOP
from rwkvpeft.generation.sampling import SamplingConfig
from rwkvpeft.generation.stopping import StopTexts
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.base import Drawn, Provided, Wanted
from rwkvpeft.ops.cross_entropy import RowChoice
from rwkvpeft.ops.cross_entropy_torch import RowProgram
from rwkvpeft.training.devices import local_device
from rwkvpeft.training.resting import at_rest
from rwkvpeft.training.teacher import load_teacher

# answers side by side: a state and a row of logits for each
_MOST_AT_ONCE = 256


def provide(
    config: TrainConfig, rows: RowDataset, held_out: RowDataset | None, program: RowChoice | RowProgram
) -> Provided:
    """What the run's objective is made of, beside its settings and the adapter.

    Args:
        program: what works on the loss's rows of logits.
    """
    if config.objective.objective == "grpo":
        return _for_rewards(config, [rows] if held_out is None else [rows, held_out], program)
    return Provided(rows=program, teacher=load_teacher(config, local_device(config.runtime)))


def _for_rewards(config: TrainConfig, data: Sequence[RowDataset], program: RowChoice | RowProgram) -> Provided:
    prompts = [rows for rows in data if isinstance(rows, PromptRows | MixedPrompts)]
    tokenizer = data_tokenizer(config.data)
    stop = StopTexts(tokenizer, (*STOP, *config.rewards.answer_stop))
    return Provided(
        rows=program,
        answer=_answers(config, stop, tokenizer.end_token),
        text=tokenizer.decode,
        record=partial(record_of, prompts),
        folder=Path(config.output.proj_dir) / "rollouts",
    )


def _answers(
    config: TrainConfig, stop: StopTexts, end_token: int | None
) -> Callable[[Rwkv, Sequence[Wanted]], list[Drawn]]:
    """What lets a model answer, as it is."""
    rewards = config.rewards
    sampling = SamplingConfig(temperature=rewards.answer_temperature, top_p=rewards.answer_top_p)

    def answer(model: Rwkv, wanted: Sequence[Wanted]) -> list[Drawn]:
        requests = [Request(one.prompt, one.seed) for one in wanted]
        with at_rest(model, config.runtime.random_seed):
            found = dict(decode(model, requests, sampling, max_tokens=rewards.answer_tokens,
                                batch_size=min(len(requests), _MOST_AT_ONCE), end_token=end_token, stop=stop))
        ordered = (found[number] for number in range(len(requests)))
        return [Drawn(*answer, text=stop.text(answer.tokens)) for answer in ordered]

    return answer
