"""Ways out when memory does not suffice: flags that make a run smaller, the cheapest first, and what each saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.splitting_batches import AUTO, in_smallest_parts, other_samples, split_batches
from rwkvpeft.errors import UserError
from rwkvpeft.memory.sharing import devices_of

_SHORT_CONTEXT = 512
_SHORT_CHUNK = 256
# of what a run needs: a way that saves less is none
_WORTH = 0.01
_MOST = 3
# what splits more than a strategy does, at the least further cost
_NEXT_STRATEGY = {
    "auto": "deepspeed_stage_2",
    "ddp": "deepspeed_stage_2",
    "deepspeed_stage_1": "deepspeed_stage_2",
    "deepspeed_stage_2": "deepspeed_stage_3",
    "deepspeed_stage_3": "deepspeed_stage_3_offload",
}

NeedOf = Callable[[TrainConfig], int | None]
"""Bytes that a run with such settings needs on each device, batches not cut any further; None if that cannot be told.
May raise UserError."""


class Way(NamedTuple):
    """``flags`` to add or change, and the settings with them, batches cut as they would be."""

    flags: str
    config: TrainConfig


def ways_out(config: TrainConfig, *, weights_first: bool = False) -> list[Way]:
    """What makes a run smaller, the cheapest first: first what leaves the results as they are.

    Args:
        weights_first: most memory is not the activations': smaller weights come before all.
    """
    ways = [*_in_parts(config), *_shared(config), *_computed_twice(config), *_rounded(config), *_shorter(config)]
    smaller = _smaller_weights(config)
    return [*smaller, *ways] if weights_first else [*ways, *smaller]


def cheapest_ways(
    config: TrainConfig, need_of: NeedOf | None = None, *, weights_first: bool = False, most: int = _MOST
) -> list[str]:
    """The first few ways that save something, with the bytes each one saves by itself.

    Args:
        need_of: tells what each way comes to; None: the flags alone.
    """
    ways = ways_out(config, weights_first=weights_first)
    if need_of is None:
        return [way.flags for way in ways[:most]]
    now = _need(need_of, in_smallest_parts(config))
    lines: list[str] = []
    for way in ways:
        if len(lines) == most:
            break
        then = _need(need_of, way.config)
        chosen = AUTO in (config.runtime.grad_cp, config.schedule.micro_split)
        if now is None or then is None or (chosen and then == now):
            # a run that failed where auto was to choose may have been taken for smaller than it is
            lines.append(way.flags)
        elif now - then > _WORTH * now:
            lines.append(f"{way.flags} (saves {_gb(now - then)})")
    return lines


def _need(need_of: NeedOf, config: TrainConfig) -> int | None:
    try:
        return need_of(config)
    except UserError:
        return None


def _changed(config: TrainConfig, group: str, **values: Any) -> TrainConfig:
    """With other values, batches cut as ``--micro_split`` says."""
    return replace(in_smallest_parts(config), **{group: replace(getattr(config, group), **values)})


def _in_parts(config: TrainConfig) -> list[Way]:
    schedule = config.schedule
    rows, split = schedule.micro_bsz, schedule.micro_split
    if rows == 1 or split == str(rows):
        return []
    if other_samples(config) is None:
        return [Way(f"--micro_split {rows}", split_batches(config, rows))]
    alone = split_batches(replace(config, data=replace(config.data, length_buckets=False)), rows)
    flags = f"--micro_bsz 1 --accumulate_grad_batches {rows * schedule.accumulate_grad_batches}"
    return [Way(flags, replace(alone, data=config.data))]


def _shared(config: TrainConfig) -> list[Way]:
    further = _NEXT_STRATEGY.get(config.runtime.strategy)
    if further is None or devices_of(config.runtime) == 1:
        return []
    return [Way(f"--strategy {further}", _changed(config, "runtime", strategy=further))]


def _computed_twice(config: TrainConfig) -> list[Way]:
    if config.runtime.grad_cp not in ("0", "selective", AUTO):
        return []
    return [Way("--grad_cp 1", _changed(config, "runtime", grad_cp="1"))]


def _rounded(config: TrainConfig) -> list[Way]:
    if config.runtime.precision not in ("fp32", "tf32", "fp64") or config.method.peft == "none":
        return []
    return [Way("--precision bf16", _changed(config, "runtime", precision="bf16"))]


def _shorter(config: TrainConfig) -> list[Way]:
    long, length = config.long_context, config.data.ctx_len or 0
    if long.infctx and length > long.chunk_ctx > _SHORT_CHUNK:
        return [Way(f"--chunk_ctx {_SHORT_CHUNK}", _changed(config, "long_context", chunk_ctx=_SHORT_CHUNK))]
    if length <= _SHORT_CONTEXT:
        return []
    shorter = Way(f"--ctx_len {_SHORT_CONTEXT}", _changed(config, "data", ctx_len=_SHORT_CONTEXT))
    if config.packs or config.runtime.cuda_graph or config.model.head_qk or long.infctx:
        return [shorter]
    chunks = _changed(config, "long_context", infctx=True, infctx_grad="exact")
    return [Way("--infctx --infctx_grad exact", chunks), shorter]


def _smaller_weights(config: TrainConfig) -> list[Way]:
    if config.method.peft == "none":
        return [Way("--peft lora", _changed(config, "method", peft="lora"))]
    if config.method.quant == "none":
        return [Way("--quant nf4", _changed(config, "method", quant="nf4"))]
    return []


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
