"""What a run hands to its objective: a teacher, a reference, answers of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback

from rwkvpeft.cli.prepare import Opened
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.reference import SPLITS_WEIGHTS, compares_with_start
from rwkvpeft.data.pair_files import MixedPairs, Pairs
from rwkvpeft.data.prompt_rows import Prompts, record_of
from rwkvpeft.data.rows import RowDataset
from rwkvpeft.data.text import data_tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.generation.batched import Request, decode
from rwkvpeft.generation.chat import STOP
from rwkvpeft.generation.sampling import SamplingConfig
from rwkvpeft.generation.stopping import StopTexts
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.base import Drawn, Provided, Wanted
from rwkvpeft.ops.cross_entropy import RowChoice
from rwkvpeft.ops.cross_entropy_torch import RowProgram
from rwkvpeft.training.devices import local_device
from rwkvpeft.training.reference import KeepReference
from rwkvpeft.training.resting import at_rest
from rwkvpeft.training.resume import as_written
from rwkvpeft.training.teacher import load_teacher

_REFERENCE_DEPENDS_ON = (
    "base model", "head_size_divisor", "adapter", "peft", "peft_config", "quant", "quant_double", "quant_head",
    "precision", "data", "val_data_file", "val_split", "data_type", "sft_field", "sft_split", "text_key", "tokenizer",
    "ctx_len", "loss_mask", "mask_think",
)
# answers side by side: a state and a row of logits for each
_MOST_AT_ONCE = 256


def provide(
    config: TrainConfig, rows: RowDataset, held_out: RowDataset | None, program: RowChoice | RowProgram
) -> Provided:
    """What the run's objective is made of, beside its settings and the adapter.

    Args:
        program: what works on the loss's rows of logits.
    Raises: UserError for pairs that the strategy cannot read.
    """
    for found in (rows, held_out):
        if isinstance(found, Pairs):
            _check_shared(config, found)
    if config.objective.objective == "grpo":
        return _for_rewards(config, [rows] if held_out is None else [rows, held_out], program)
    return Provided(rows=program, teacher=load_teacher(config, local_device(config.runtime)))


def keeps_reference(
    config: TrainConfig, opened: Opened, essentials: Mapping[str, Any], report: Callable[[str], None]
) -> list[Callback]:
    """What works out, before the first step, what the run's answers are compared with, if that is not found in each.

    Args:
        essentials: of the run, as ``essential_settings``.
    """
    if not compares_with_start(config):
        return []
    held_out = {} if opened.held_out is None else {"held_out": opened.held_out}
    rows = {name: found for name, found in {"": opened.rows, **held_out}.items() if isinstance(found, Pairs)}
    stamp = as_written({name: essentials[name] for name in _REFERENCE_DEPENDS_ON})
    folders = [Path(config.output.proj_dir)]
    if config.output.resume not in ("auto", "none"):
        folders += [Path(config.output.resume).parent, Path(config.output.resume).parent.parent]
    return [KeepReference(rows, folders, stamp, micro_bsz=config.schedule.micro_bsz, report=report)]


def _check_shared(config: TrainConfig, pairs: Pairs) -> None:
    """Where weights are split every process must ask for them as often as the others, once more for what is shared."""
    parts = pairs.pairs if isinstance(pairs, MixedPairs) else [pairs]
    alone = [part.label(index) for part in parts for index in part.sharing_nothing()]
    if alone and config.runtime.strategy in SPLITS_WEIGHTS and config.runtime.devices * config.runtime.num_nodes > 1:
        raise UserError(
            f"{len(alone)} pairs have answers that share no beginning, which split weights do not allow",
            found=", ".join(alone[:3]), expected="a prompt that both answers go on from",
            fix=f"--strategy ddp instead of {config.runtime.strategy}, or leave these pairs out",
        )


def _for_rewards(config: TrainConfig, data: Sequence[RowDataset], program: RowChoice | RowProgram) -> Provided:
    prompts = [rows for rows in data if isinstance(rows, Prompts)]
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
