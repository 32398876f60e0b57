"""A run whose batches are worked through in parts: less memory at once, the same rows in each step.

Which rows an optimizer step takes depends on the rows of a step alone. How many of them are in memory together,
``micro_bsz``, decides nothing but speed and memory, and what dropout draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.errors import ContractError

AUTO = "auto"


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
            micro_split="1",
        ),
    )


def in_smallest_parts(config: TrainConfig) -> TrainConfig:
    """The run in the parts that ``--micro_split`` asks for; for auto in the smallest it may choose, single rows."""
    asked, rows = config.schedule.micro_split, config.schedule.micro_bsz
    return split_batches(config, rows if asked == AUTO else int(asked))


def possible_parts(micro_bsz: int) -> list[int]:
    """The numbers of equal parts that so many rows can be cut into, ascending, 1 among them."""
    small = [parts for parts in range(1, isqrt(max(micro_bsz, 0)) + 1) if micro_bsz % parts == 0]
    return sorted({*small, *(micro_bsz // parts for parts in small)})


def other_samples(config: TrainConfig) -> str | None:
    """Why a split run would take other rows into its steps; None if it takes the same."""
    if config.data.length_buckets:
        return "--length_buckets puts documents of similar length together by the number of rows in a batch"
    return None


def other_noise(config: TrainConfig) -> str | None:
    """What of a split run differs though its rows are the same; None if nothing does but the order of sums.

    The dropout of an adapter itself is not among these settings: ``training.essentials.other_results`` knows it too.
    """
    if config.method.dropout or config.method.neftune_alpha:
        return "what --dropout and --neftune_alpha draw is drawn for each batch"
    if config.objective.objective == "kto":
        return "kto estimates its divergence from each batch"
    if config.rewards.advantage == "reinforce++":
        return "--advantage reinforce++ goes by the mean of each batch"
    if config.data.dataload == "pack" and config.optimizer.logit_penalty:
        return "--logit_penalty is a mean over a batch, and packed batches are not equally full"
    return None


def spelled_out(raw: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Values as typed, by field name, with ``--micro_bsz auto`` and ``auto:N`` as the two settings they stand for."""
    values = dict(raw)
    typed = values.get("micro_bsz")
    word = typed[0] if isinstance(typed, list) and typed else typed
    if not isinstance(word, str) or word.partition(":")[0] != AUTO:
        return values
    split = values.setdefault("micro_split", AUTO)
    findings.check(
        split in (AUTO, [AUTO]),
        f"--micro_bsz {word} chooses the parts itself, and --micro_split gives their number",
        fix=f"leave --micro_split out, or --micro_bsz {word.partition(':')[2] or 'N'}",
    )
    del values["micro_bsz"]
    if ":" in word:
        values["micro_bsz"] = word.partition(":")[2]
    return values


def check_halving(config: TrainConfig, findings: Findings) -> None:
    """Note what keeps a run from going on in smaller batches after it ran out of memory."""
    if config.faults.on_oom != "halve":
        return
    devices = config.runtime.devices * config.runtime.num_nodes
    findings.check(
        devices == 1,
        "--on_oom halve is for one device: several would have to agree after one of them has failed",
        found=f"{devices} devices",
        fix="--on_oom stop, and --micro_bsz auto to begin with what is expected to fit",
    )
    reason = other_samples(config)
    findings.check(
        reason is None, "--on_oom halve would train other rows in each step", found=reason, fix="--on_oom stop"
    )


def check_splitting(config: TrainConfig, findings: Findings) -> None:
    """Note a number of parts that rows cannot be cut into, and settings under which other rows would be trained."""
    asked, rows = config.schedule.micro_split, config.schedule.micro_bsz
    if asked == "1":
        return
    if asked == AUTO:
        findings.check(
            config.runtime.num_nodes == 1,
            "several machines cannot agree by themselves on the parts that batches are cut into",
            found=f"--micro_split {AUTO}",
            fix="--micro_split N, where python -m rwkvpeft.plan tells what fits",
        )
    else:
        parts = [str(number) for number in possible_parts(rows)]
        findings.check(
            asked in parts,
            f"--micro_split cannot cut {rows} rows into equal parts",
            found=asked[:20],
            expected=f"{', '.join(parts)} or {AUTO}",
        )
    reason = other_samples(config)
    findings.check(
        reason is None, "a batch that is cut into parts would have other rows", found=reason,
        fix="leave --micro_split out, or what it does not go with",
    )
