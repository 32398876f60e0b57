"""``--micro_bsz auto``: batches in the largest parts that fit, decided before the data's order is laid out; and what to
do when memory did not suffice after all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from rwkvpeft.checkpoints.quantised import Quantisation
from rwkvpeft.cli.assemble import Base, likely_programs, make_adapter
from rwkvpeft.cli.prepare import Opened
from rwkvpeft.cli.scratch import planned_shape
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.splitting_batches import split_batches
from rwkvpeft.errors import UserError
from rwkvpeft.memory import (
    PLAIN_PROGRAMS,
    Expected,
    NoOutline,
    cheapest_ways,
    choose_parts,
    devices_of,
    expect,
    free_memory,
    memory_of_each,
)
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.training.devices import find_device, local_device


class Fitted(NamedTuple):
    """The settings a run goes on with, and lines for its report."""

    config: TrainConfig
    opened: Opened
    remarks: list[str]


def ways_to_save(config: TrainConfig) -> list[str]:
    """The three cheapest ways out for a run that has failed for want of memory, each with the bytes it saves."""

    def need_of(settings: TrainConfig) -> int:
        shape, packed = planned_shape(settings)
        return _expected(shape, packed, settings, find_device(settings.runtime)).total

    return cheapest_ways(config, need_of)


def fit_to_memory(config: TrainConfig, base: Base, opened: Opened) -> Fitted:
    """Cut the batches as ``--micro_split`` says.

    One process goes by the memory that is free on its device now. Several cannot talk to each other yet: each goes by
    what all of them see alike, the memory of the smallest device. A run that is taken up again may so be cut otherwise:
    its steps stay the same.
    """
    if config.schedule.micro_split == "1":
        return Fitted(config, opened, [])
    device = local_device(config.runtime)

    def need_of(settings: TrainConfig) -> Expected:
        return _expected(base.shape, base.packed, settings, device.type, opened.crowded)

    alone = devices_of(config.runtime) == 1
    free = free_memory(device) if alone else memory_of_each(device.type, config.runtime)
    choice = choose_parts(opened.longest, need_of, free=free, device_type=device.type)
    remarks = [choice.report] if choice.report else []
    rows_at_once = config.schedule.micro_bsz * devices_of(config.runtime)
    # a pass is as long as in whole batches
    epoch_steps = -(-opened.rows.pass_rows // rows_at_once)
    return Fitted(
        split_batches(config, choice.parts, epoch_steps=epoch_steps),
        opened._replace(longest=split_batches(opened.longest, choice.parts)),
        remarks,
    )


def _expected(
    shape: ModelShape, packed: Quantisation, settings: TrainConfig, device_type: str, documents: Sequence[int] = ()
) -> Expected:
    adapter = partial(make_adapter, settings.method)
    # a package's program may fail in any way without data: the plain one needs more
    for programs in (likely_programs(shape, settings, device_type), PLAIN_PROGRAMS):
        try:
            return expect(shape, settings, adapter, packed, programs, documents)
        except UserError:
            raise
        except Exception:  # noqa: BLE001
            continue
    raise NoOutline("what this run needs cannot be told without running it")
