"""How long a run is, and where it stands: the settings counted in steps and rows."""

from __future__ import annotations

import math

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.training.module import RunPlan, RunProgress
from rwkvpeft.training.schedules import steps_per_epoch, steps_to_tokens


def run_plan(config: TrainConfig, epoch_steps: int, begun: int = 0) -> RunPlan:
    """How long a run is whose mini-epochs have ``epoch_steps`` batches, ``begun`` of them done by earlier runs."""
    schedule = config.schedule
    epoch_count = schedule.epoch_count
    last_step = steps_to_tokens(schedule, epoch_steps=epoch_steps, batch_tokens=batch_tokens(config))
    if last_step is not None:
        per_epoch = steps_per_epoch(epoch_steps, schedule.accumulate_grad_batches)
        epoch_count = min(epoch_count, math.ceil(last_step / per_epoch))
    return RunPlan(
        epoch_steps=epoch_steps,
        epoch_count=max(epoch_count, 0),
        accumulate_grad_batches=schedule.accumulate_grad_batches,
        rows_at_once=_rows_at_once(config),
        epoch_begin=schedule.epoch_begin,
        last_step=last_step,
        begun=begun,
    )


def first_progress(config: TrainConfig, plan: RunPlan) -> RunProgress:
    """Where a run begins that has not been saved yet."""
    rows = plan.begun * plan.epoch_steps * plan.rows_at_once
    return RunProgress(step=plan.begun_steps, rows=rows, tokens=rows * (config.data.ctx_len or 1))


def batch_tokens(config: TrainConfig) -> int:
    """Positions of one batch on all devices, as RWKV-LM counts tokens."""
    return _rows_at_once(config) * (config.data.ctx_len or 1)


def _rows_at_once(config: TrainConfig) -> int:
    return config.schedule.micro_bsz * config.runtime.devices * config.runtime.num_nodes


def epochs_left(config: TrainConfig, plan: RunPlan, progress: RunProgress) -> int:
    """Mini-epochs that are still to be trained, the one begun included."""
    epochs = min(plan.epoch_count, config.schedule.my_exit - plan.epoch_begin + 1)
    return math.ceil((epochs * plan.epoch_steps - plan.batches_in(progress.rows)) / plan.epoch_steps)
