"""In how many parts batches are worked through: the fewest that the memory at hand allows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.splitting_batches import AUTO, possible_parts, split_batches
from rwkvpeft.memory.expected import Expected
from rwkvpeft.memory.levels import fits, with_level
from rwkvpeft.memory.outline import NoOutline
from rwkvpeft.models.recompute import LEVELS

# fewer tokens at once leave a device idle for longer than computing activations twice takes
_ENOUGH_TOKENS = 1024


class PartsChoice(NamedTuple):
    """How many parts a batch is cut into, and one line on why; empty if nothing was to be chosen."""

    parts: int
    report: str


def choose_parts(
    config: TrainConfig, need_of: Callable[[TrainConfig], Expected], *, free: int | None, device_type: str
) -> PartsChoice:
    """Take ``--micro_split`` as given; for auto the fewest parts that are expected to fit.

    With ``--grad_cp auto`` as little as possible is computed twice, as long as parts keep enough tokens.

    Args:
        need_of: what a run needs with such settings, ``--grad_cp`` decided; may raise NoOutline.
        free: bytes of the device that the run may fill; None if that cannot be told.
    """
    asked, rows = config.schedule.micro_split, config.schedule.micro_bsz
    if asked != AUTO:
        return PartsChoice(int(asked), "")
    if free is None:
        return _single_rows(rows, "how much memory is free cannot be told beforehand")
    candidates = possible_parts(rows)
    levels = list(LEVELS) if config.runtime.grad_cp == AUTO else [config.runtime.grad_cp]

    @cache
    def need(parts: int, level: str) -> int:
        return need_of(with_level(split_batches(config, parts), level)).total

    try:
        for level in levels:
            found = bisect_left(candidates, True, key=lambda parts: fits(need(parts, level), free, device_type))
            if found == len(candidates):
                continue
            parts = candidates[found]
            few = parts > 1 and rows // parts * config.tokens_at_once < _ENOUGH_TOKENS
            if not few or level == levels[-1]:
                return PartsChoice(parts, _report(rows, parts, need(parts, level), free))
    except NoOutline:
        return _single_rows(rows, "what the run needs cannot be told beforehand")
    return _single_rows(rows, f"not even single rows are expected to fit into {_gb(free)}")


def _single_rows(rows: int, why: str) -> PartsChoice:
    return PartsChoice(rows, f"rows: {rows} a batch, one after another: {why}")


def _report(rows: int, parts: int, need: int, free: int) -> str:
    how = "all at once" if parts == 1 else f"in {parts} parts of {rows // parts}, the fewest that fit"
    return f"rows: {rows} a batch, {how}: {_gb(need)} expected of {_gb(free)}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
