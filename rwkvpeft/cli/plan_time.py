"""How long a step and a run are expected to take: as an earlier run did, or from what there is to compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.memory import measured_speed
from rwkvpeft.training.devices import COMPUTE_DTYPES

if TYPE_CHECKING:
    from rwkvpeft.memory import Work

_STEPS_LOOKED_AT = 50


def time_lines(
    config: TrainConfig, work: Work | None, *, steps: int | None, step_tokens: int, here: torch.device | None,
    tflops: float | None,
) -> list[str]:
    """What is known of a run's speed.

    Args:
        work: of a step on one device; None if it cannot be told.
        steps: of the run; None if that cannot be told.
        step_tokens: positions that all devices read in a step.
        here: the device planned for, if this machine has it, to be timed.
        tflops: what the user says a device does, in 1e12 operations a second.
    """
    path = Path(config.output.proj_dir) / "loss_data.jsonl"
    seen = tokens_a_second(path)
    computed = [] if work is None else [
        f"work: {_quantity(work.flops, 'FLOP')} in matrix products and {_quantity(work.moved, 'B')} to read and write "
        "beside them, in a step, on each device"
    ]
    if seen is not None:
        total = "" if steps is None else f"; {_duration(steps * step_tokens / seen)} for this run at that speed"
        return [f"speed: {seen:,.0f} tokens/s, as in the last steps in {path}{total}", *computed]
    if work is None:
        return ["speed: unknown until the first step"]
    if tflops is not None:
        seconds = work.flops / (tflops * 1e12)
        basis = f"at {tflops:g} TFLOP/s, as --tflops says"
    elif here is not None:
        speed = measured_speed(here, COMPUTE_DTYPES[config.runtime.precision or "fp32"])
        seconds = work.flops / speed.flops + work.moved / speed.moved
        basis = (
            f"estimated from that work, {_quantity(speed.flops, 'FLOP/s')} of large products and "
            f"{_quantity(speed.moved, 'B/s')} of copying, timed here just now"
        )
    else:
        return [*computed, "speed: unknown, for that device is not here: --tflops X tells how fast it computes"]
    total = "" if steps is None else f", {_duration(seconds * steps)} for this run"
    return [
        *computed,
        f"speed: {_duration(seconds)} a step or more, {step_tokens / seconds:,.0f} tokens/s or fewer{total}: {basis}; "
        "waiting for data and for other devices is not in it",
    ]


def tokens_a_second(path: Path) -> float | None:
    """What the last steps of a run did, from its ``loss_data.jsonl``; None if that does not tell."""
    if not path.is_file():
        return None
    try:
        steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[-_STEPS_LOOKED_AT:]]
        seconds = sum(float(step["t_cost"]) for step in steps)
        return sum(int(step["tokens"]) for step in steps) / seconds if seconds > 0 else None
    except (ValueError, KeyError, TypeError):
        # cut short by a kill, or another program's
        return None


def _quantity(count: float, unit: str) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= size:
            return f"{count / size:.3g} {letter}{unit}"
    return f"{count / 1e6:.3g} M{unit}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
