"""The rows of a run, of the kind that its objective reads."""

from __future__ import annotations

from rwkvpeft.config.groups import DataConfig, TrainConfig
from rwkvpeft.data.dataset import open_dataset, open_split
from rwkvpeft.data.pair_batches import PAIR, WITH_MISMATCHED
from rwkvpeft.data.pair_files import open_pairs, open_pairs_split
from rwkvpeft.data.prompt_rows import open_prompts, open_prompts_split
from rwkvpeft.data.rows import RowDataset


def open_rows(config: TrainConfig, data: DataConfig, vocab_size: int, first_number: int = 0) -> RowDataset:
    """Rows of tokens, of preferred answers or of prompts.

    Args:
        data: ``config.data`` or held-out data of the same kind.
        vocab_size: token ids of the model.
        first_number: of the first record of prompts.
    Raises: UserError as what opens rows of the kind.
    """
    assert config.data.ctx_len is not None
    ctx_len, seed = config.data.ctx_len, config.runtime.random_seed
    if config.objective.reads == "pairs":
        return open_pairs(data, ctx_len=ctx_len, vocab_size=vocab_size, seed=seed, answers=answers_of(config))
    if config.objective.reads == "prompts":
        return open_prompts(data, ctx_len=ctx_len, vocab_size=vocab_size, seed=seed, first_number=first_number)
    return open_dataset(data, ctx_len=ctx_len, vocab_size=vocab_size, seed=seed)


def open_rows_split(config: TrainConfig, share: float, vocab_size: int) -> tuple[RowDataset, RowDataset]:
    """``open_rows`` of a share of the records, or so many of them, and those of the rest first. Raises as it does."""
    assert config.data.ctx_len is not None
    ctx_len, seed = config.data.ctx_len, config.runtime.random_seed
    if config.objective.reads == "pairs":
        return open_pairs_split(
            config.data, share, ctx_len=ctx_len, vocab_size=vocab_size, seed=seed, answers=answers_of(config)
        )
    if config.objective.reads == "prompts":
        return open_prompts_split(config.data, share, ctx_len=ctx_len, vocab_size=vocab_size, seed=seed)
    return open_split(config.data, share, ctx_len=ctx_len, vocab_size=vocab_size, seed=seed)


def answers_of(config: TrainConfig) -> int:
    """Answers to each prompt that the objective reads."""
    return WITH_MISMATCHED if config.objective.objective == "kto" else PAIR
