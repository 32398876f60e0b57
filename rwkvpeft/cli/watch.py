"""From settings to what a run is watched by: held-out rows, general text, prompts and what answers them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.config.check_evaluation import general_data, other_data
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.dataset import open_stream
from rwkvpeft.data.openings import open_rows, open_rows_split
from rwkvpeft.data.prompt_rows import Prompts
from rwkvpeft.data.prompts import Prompt, held_out_prompts, read_prompts
from rwkvpeft.data.rows import RowDataset
from rwkvpeft.data.text import data_tokenizer
from rwkvpeft.data.tokenizer import Tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.generation.chat import STOP
from rwkvpeft.generation.generate import TextGenerator
from rwkvpeft.generation.sampling import Sampler, SamplingConfig
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.training.callbacks.watching import Watched

# of the held-out conversations, for the report
_REPORTED_PROMPTS = 3
_NEXT_TURNS = (*STOP, "\n\nAssistant:", "\n\nInstruction:")


def open_training_data(config: TrainConfig, vocab_size: int) -> tuple[RowDataset, RowDataset | None]:
    """The rows to train on, and those that are held out; None if none are.

    Raises: UserError as ``open_rows`` and ``open_rows_split``.
    """
    evaluation = config.evaluation
    if evaluation.val_split:
        return open_rows_split(config, evaluation.val_split, vocab_size)
    dataset = open_rows(config, config.data, vocab_size)
    if not evaluation.val_data_file:
        return dataset, None
    # rewards tell the records of both by their numbers
    behind = dataset.numbers.stop if isinstance(dataset, Prompts) else 0
    return dataset, open_rows(config, other_data(config.data, evaluation.val_data_file), vocab_size, behind)


def make_watched(
    config: TrainConfig,
    held_out: RowDataset | None,
    vocab_size: int,
    adapter: Adapter | None,
    *,
    answers: bool = True,
) -> Watched:
    """What the run is watched by.

    Args:
        answers: whether the model can continue a text, so that the report can show answers.

    Raises: UserError if the general data or the prompts cannot be read, or do not belong to the model's vocabulary.
    """
    evaluation, long_context = config.evaluation, config.long_context
    general = _open_general(config, vocab_size) if evaluation.general_data_file else None
    prompts: list[Prompt] = []
    answer: Callable[[Rwkv, str], str] | None = None
    if evaluation.sample_prompts or (evaluation.report and answers and held_out is not None):
        tokenizer = data_tokenizer(config.data)
        prompts = _prompts(config, held_out, tokenizer, vocab_size)
        answer = _answerer(tokenizer, evaluation.sample_tokens)
    starts_tuned = adapter is not None and bool(config.method.adapter)
    return Watched(
        held_out=held_out,
        general=general,
        micro_bsz=config.schedule.micro_bsz,
        is_own=config.objective.reads != "tokens",
        chunk=long_context.chunk_ctx if long_context.infctx else None,
        prompts=prompts,
        answers_each_time=bool(evaluation.sample_prompts),
        answer=answer,
        untuned=adapter.disabled if starts_tuned and adapter is not None else lambda model: nullcontext(),
    )


def _open_general(config: TrainConfig, vocab_size: int) -> RowDataset:
    assert config.data.ctx_len is not None
    data = general_data(config.data, config.evaluation.general_data_file)
    return open_stream(data, ctx_len=config.data.ctx_len, vocab_size=vocab_size)


def _prompts(
    config: TrainConfig, held_out: RowDataset | None, tokenizer: Tokenizer, vocab_size: int
) -> list[Prompt]:
    belongs = tokenizer.vocab_size <= vocab_size
    if config.evaluation.sample_prompts:
        if not belongs:
            raise UserError(
                f"the tokenizer {tokenizer.name} does not belong to this model",
                found=f"{tokenizer.vocab_size} token ids",
                expected=f"at most {vocab_size}, to answer --sample_prompts",
                fix="--tokenizer with the one of the data",
            )
        return read_prompts(config.evaluation.sample_prompts)
    return held_out_prompts(held_out, tokenizer, _REPORTED_PROMPTS) if belongs and held_out is not None else []


def _answerer(tokenizer: Tokenizer, max_tokens: int) -> Callable[[Rwkv, str], str]:
    """What continues a text by the likeliest tokens, up to the next turn."""

    def answer(model: Rwkv, text: str) -> str:
        generator = TextGenerator(model, tokenizer)
        sampler = Sampler(SamplingConfig(temperature=0.0, seed=0))
        pieces = generator.stream(text, sampler, max_tokens=max_tokens, stop=_NEXT_TURNS)
        return "".join(pieces).strip()

    return answer
