"""A run whose batches are worked through in parts: less memory at once, the same results.

Which rows an optimizer step takes depends on the rows of a step alone. How many of them are in memory together,
``micro_bsz``, decides nothing but speed and memory.
"""

from __future__ import annotations

from dataclasses import replace

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.errors import ContractError


def split_batches(config: TrainConfig, parts: int, *, epoch_steps: int | None = None) -> TrainConfig:
    """The same run with each batch cut into ``parts`` equal ones, all of which still belong to one optimizer step.

    Rows of a step, steps of a mini-epoch and learning rates by steps or tokens stay what they are; ``other_samples``
    and ``other_noise`` tell the settings with which something else does not.

    Args:
        parts: divides ``micro_bsz``; see ``possible_parts``.
        epoch_steps: batches of a mini-epoch before splitting, for ``--epoch_steps 0``, which leaves them to the data:
            a pass in smaller batches is otherwise filled up to other rows at its end.
    Raises: ContractError if ``micro_bsz`` cannot be divided so.
    """
    schedule = config.schedule
    if parts < 1 or schedule.micro_bsz % parts:
        raise ContractError(f"{schedule.micro_bsz} rows cannot be cut into {parts} equal parts")
    steps = schedule.epoch_steps or epoch_steps or 0
    return replace(
        config,
        schedule=replace(
            schedule,
            micro_bsz=schedule.micro_bsz // parts,
            accumulate_grad_batches=schedule.accumulate_grad_batches * parts,
            epoch_steps=steps * parts,
        ),
    )


def possible_parts(micro_bsz: int) -> list[int]:
    """The numbers of equal parts that so many rows can be cut into, ascending, 1 among them."""
    return [parts for parts in range(1, micro_bsz + 1) if micro_bsz % parts == 0]


def other_samples(config: TrainConfig) -> str | None:
    """Why a split run would take other rows into its steps; None if it takes the same."""
    if config.data.length_buckets:
        return "--length_buckets puts documents of similar length together by the number of rows in a batch"
    return None


def other_noise(config: TrainConfig) -> str | None:
    """What of a split run differs though its rows are the same; None if nothing does but the order of sums."""
    if config.method.dropout or config.method.neftune_alpha:
        return "what --dropout and --neftune_alpha draw is drawn for each batch"
    if config.data.dataload == "pack" and config.optimizer.logit_penalty:
        return "--logit_penalty is a mean over a batch, and packed batches are not equally full"
    return None
