"""Learning rates: pure functions of the optimizer step.

All share the arguments ``step`` (optimizer steps taken so far), ``total_steps`` (of the whole run, after division by
the accumulated batches), ``lr_init``, ``lr_final`` and ``warmup_steps`` (0 or less for none). Beyond the last step
the rate stays at ``lr_final``. Equal ends give a constant rate.

Where this differs from RWKV-PEFT: its total is not divided by the accumulated batches, so that accumulating runs
never come down; its ``wsd`` fixes the warm-up at 100 steps (and warms up twice when one is given) and ends at 0
whatever ``lr_final`` says.
"""

from __future__ import annotations

import math
from typing import Protocol

from rwkvpeft.config.groups import OptimizerConfig, ScheduleConfig
from rwkvpeft.errors import ContractError
from rwkvpeft.registry import SCHEDULES, find

_WSD_WARMUP = 100


def cosine(step: int, *, total_steps: int, lr_init: float, lr_final: float, warmup_steps: int) -> float:
    """Half a cosine from ``lr_init`` to ``lr_final``, the warm-up's steps included, as RWKV-PEFT's ``cos``."""
    if step >= total_steps or lr_init == lr_final:
        lr = lr_final
    else:
        lr = lr_final + (lr_init - lr_final) / 2 * (1 + math.cos(math.pi * step / total_steps))
    return lr * _warmup(step, warmup_steps)


def warmup_stable_decay(step: int, *, total_steps: int, lr_init: float, lr_final: float, warmup_steps: int) -> float:
    """A straight line from 0 over the warm-up, then half a cosine to ``lr_final``: RWKV-PEFT's ``wsd``, mended.

    Without a given warm-up it takes 100 steps, but never more than half of the run.
    """
    if warmup_steps <= 0:
        warmup_steps = min(_WSD_WARMUP, total_steps // 2)
    if step < warmup_steps:
        return lr_init * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return lr_final + (lr_init - lr_final) * 0.5 * (1 + math.cos(math.pi * progress))


def exponential(step: int, *, total_steps: int, lr_init: float, lr_final: float, warmup_steps: int) -> float:
    """A constant factor per step after the warm-up, as RWKV-LM's v5 trainer; a straight line if one end is 0."""
    if lr_init == 0 or lr_final == 0:
        return linear(
            step, total_steps=total_steps, lr_init=lr_init, lr_final=lr_final, warmup_steps=warmup_steps
        )
    progress = _progress(step, total_steps, warmup_steps)
    lr = math.exp(math.log(lr_init) + (math.log(lr_final) - math.log(lr_init)) * progress)
    return lr * _warmup(step, warmup_steps)


def linear(step: int, *, total_steps: int, lr_init: float, lr_final: float, warmup_steps: int) -> float:
    """A straight line from ``lr_init`` to ``lr_final`` after the warm-up."""
    lr = lr_init + (lr_final - lr_init) * _progress(step, total_steps, warmup_steps)
    return lr * _warmup(step, warmup_steps)


def constant(step: int, *, total_steps: int, lr_init: float, lr_final: float, warmup_steps: int) -> float:
    """``lr_init`` after the warm-up, for optimizers that average instead of slowing down; ``lr_final`` is not used."""
    return lr_init * _warmup(step, warmup_steps)


def cosine_by_tokens(
    tokens: int, *, exit_tokens: int, warmup_tokens: int, lr_init: float, lr_final: float
) -> float:
    """Half a cosine from ``lr_init`` to ``lr_final`` over the tokens after the warm-up, as RWKV-LM counts them."""
    progress = max(0.0, min(1.0, (tokens - warmup_tokens) / max(exit_tokens - warmup_tokens, 1)))
    share = lr_final / lr_init
    return lr_init * ((0.5 + share / 2) + (0.5 - share / 2) * math.cos(math.pi * progress))


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    # off by one, and by two without a warm-up (-1): RWKV-LM's own counting, kept so that runs compare
    return min(max((step - warmup_steps + 1) / max(total_steps - warmup_steps, 1), 0.0), 1.0)


def _warmup(step: int, warmup_steps: int) -> float:
    return 0.01 + 0.99 * step / warmup_steps if step < warmup_steps else 1.0


def steps_per_epoch(epoch_steps: int, accumulate_grad_batches: int) -> int:
    """Optimizer steps of a mini-epoch of ``epoch_steps`` batches; a short last group makes a step too."""
    return math.ceil(epoch_steps / accumulate_grad_batches)


class Schedule(Protocol):
    """The learning rate of a run; ``lr_init`` and ``lr_final`` put other ends to the same shape."""

    def __call__(self, step: int, *, lr_init: float = ..., lr_final: float = ...) -> float:
        """The rate of the step after ``step`` steps."""
        ...


def batches_before(step: int, *, epoch_steps: int, accumulate_grad_batches: int) -> int:
    """Batches of one device that the first ``step`` optimizer steps take."""
    epochs, steps = divmod(step, steps_per_epoch(epoch_steps, accumulate_grad_batches))
    return epochs * epoch_steps + min(steps * accumulate_grad_batches, epoch_steps)


def steps_to_tokens(
    config: ScheduleConfig, *, epoch_steps: int, batch_tokens: int
) -> int | None:
    """Optimizer steps after which ``--my_exit_tokens`` are reached; None without such an end.

    The tokens of the mini-epochs before ``epoch_begin`` count too, as in RWKV-LM.
    """
    if not config.my_exit_tokens:
        return None
    batches = math.ceil(abs(config.my_exit_tokens) / batch_tokens) - config.epoch_begin * epoch_steps
    epochs, left = divmod(max(batches, 0), epoch_steps)
    accumulated = config.accumulate_grad_batches
    return epochs * steps_per_epoch(epoch_steps, accumulated) + math.ceil(left / accumulated)


def build_schedule(
    config: ScheduleConfig, *, epoch_steps: int, keeps_rate: bool = False, batch_tokens: int = 0, begun: int = 0
) -> Schedule:
    """The learning rate of a run as a function of the optimizer step.

    With ``my_exit_tokens`` it is a cosine by tokens, whatever ``lr_schedule`` says; if they are negative, the mean of
    the two (RWKV-LM's v5 trainer).

    Args:
        begun: steps that were taken before this run, which goes on where the schedule stood with a warm-up of its own.
        epoch_steps: batches per device in a mini-epoch, with 0 already replaced by what one pass takes.
        keeps_rate: the optimizer wants ``constant``, whatever schedule the settings name.
        batch_tokens: tokens of one batch on all devices; only ``my_exit_tokens`` needs them.
    Raises: UserError if the schedule's name is unknown.
    """
    if config.lr_init is None or config.lr_final is None or config.warmup_steps is None:
        raise ContractError("a schedule needs resolved settings")
    warmup = config.warmup_steps
    ends = {"lr_init": config.lr_init, "lr_final": config.lr_final}
    total = steps_per_epoch(epoch_steps, config.accumulate_grad_batches) * config.epoch_count
    shape = constant if keeps_rate else find(SCHEDULES, config.lr_schedule, flag="--lr_schedule")

    def by_steps(step: int, **other_ends: float) -> float:
        rate: float = shape(step, total_steps=total, warmup_steps=warmup, **{**ends, **other_ends})
        return rate / _warmup(step, warmup) * _warmup(step - begun, warmup) if begun else rate

    def by_tokens(step: int, **other_ends: float) -> float:
        batches = batches_before(
            step, epoch_steps=epoch_steps, accumulate_grad_batches=config.accumulate_grad_batches
        )
        rate = cosine_by_tokens(
            (batches + config.epoch_begin * epoch_steps) * batch_tokens,
            exit_tokens=abs(config.my_exit_tokens),
            warmup_tokens=warmup * config.accumulate_grad_batches * batch_tokens,
            **{**ends, **other_ends},
        )
        return rate * _warmup(step - begun, warmup)

    def by_both(step: int, **other_ends: float) -> float:
        return (by_steps(step, **other_ends) + by_tokens(step, **other_ends)) / 2

    if keeps_rate or not config.my_exit_tokens:
        return by_steps
    return by_tokens if config.my_exit_tokens > 0 else by_both


def weight_decay_at(
    step: int, *, total_steps: int, config: OptimizerConfig, exponential_from: int | None = None
) -> float:
    """Weight decay of the groups that have any: a straight line to ``weight_decay_final`` if that is not negative.

    Args:
        exponential_from: a constant factor per step instead, after so many steps of warm-up: what RWKV-LM pairs with
            its exponential learning rate. A straight line where one end is 0.
    """
    first, last = config.weight_decay, config.weight_decay_final
    if last < 0:
        return first
    if exponential_from is not None and first > 0 and last > 0:
        return first * math.exp(math.log(last / first) * _progress(step, total_steps, exponential_from))
    progress = min(step / max(total_steps, 1), 1.0)
    return first + (last - first) * progress
