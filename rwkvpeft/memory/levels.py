"""Which activations a run computes twice: the fewest that the memory at hand allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from rwkvpeft.checkpoints.quantised import Quantisation
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.memory.expected import Expected, expect
from rwkvpeft.memory.machine import OVERHEAD_BYTES
from rwkvpeft.memory.outline import PLAIN_PROGRAMS, UNPACKED, MakeAdapter, Programs
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import ModelShape

SLACK = 1.05
"""What the allocator takes beyond the tensors asked of it."""

_WHAT = {"0": "nothing", "selective": "all but large products", "1": "whole blocks"}
_LEAST = "1"


class LevelChoice(NamedTuple):
    """A value of ``--grad_cp`` other than auto, and one line on what it is and why."""

    grad_cp: str
    report: str


def with_level(config: TrainConfig, grad_cp: str) -> TrainConfig:
    """The same settings at one level of recomputing."""
    return replace(config, runtime=replace(config.runtime, grad_cp=grad_cp))


def expect_levels(
    shape: ModelShape,
    config: TrainConfig,
    make_adapter: MakeAdapter,
    packed: Quantisation = UNPACKED,
    programs: Programs = PLAIN_PROGRAMS,
    documents: Sequence[int] = (),
) -> dict[str, Expected]:
    """What a run will need at each level, by the value of ``--grad_cp``, the fastest first. See ``expect``."""
    return {
        grad_cp: expect(shape, with_level(config, grad_cp), make_adapter, packed, programs, documents)
        for grad_cp in LEVELS
    }


def choose_level(
    needs: Mapping[str, Expected], config: TrainConfig, *, free: int | None, device_type: str
) -> LevelChoice:
    """Take ``--grad_cp`` as given; for auto the fastest level whose expected peak fits.

    Args:
        needs: of ``expect_levels``; empty if that cannot be told.
        free: bytes of the device that the run may fill; None if that cannot be told.
    """
    asked = config.runtime.grad_cp
    if asked != "auto":
        return LevelChoice(asked, f"{_WHAT[asked]}, as --grad_cp {asked} says")
    if free is None or not needs:
        unknown = "what the run needs" if free is not None else "how much memory is free"
        return LevelChoice(_LEAST, f"{_WHAT[_LEAST]} (--grad_cp {_LEAST}): {unknown} cannot be told beforehand")
    chosen = next((level for level in LEVELS if fits(needs[level].total, free, device_type)), None)
    taken = chosen or _LEAST
    figures = ", ".join(f"{level} {_gb(needs[level].total)}" for level in LEVELS)
    word = "the fastest that fits into" if chosen else "though not expected to fit into"
    return LevelChoice(taken, f"{_WHAT[taken]}, {word} {_gb(free)} (expected with --grad_cp {figures})")


def fits(need: int, free: int, device_type: str) -> bool:
    """Whether an expected peak of tensors, and what is there beside them, can be had."""
    return need * SLACK + OVERHEAD_BYTES.get(device_type, 0) <= free


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
