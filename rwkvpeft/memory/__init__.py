"""How much memory a run needs: the least, which is checked before anything is loaded, and what to expect."""

from rwkvpeft.memory.dry_run import bytes_kept
from rwkvpeft.memory.expected import Expected, expect
from rwkvpeft.memory.least import Least, check_memory, least_need, refuse_if_too_large
from rwkvpeft.memory.levels import LevelChoice, choose_level, expect_levels, fits, with_level
from rwkvpeft.memory.machine import OVERHEAD_BYTES, free_memory, memory_of_each, total_memory
from rwkvpeft.memory.outline import (
    PLAIN_PROGRAMS,
    Counts,
    MakeAdapter,
    NoOutline,
    Programs,
    count,
    count_parameters,
    counts_of,
    training_outline,
)
from rwkvpeft.memory.parts import PartsChoice, choose_parts
from rwkvpeft.memory.sharing import devices_of, shares_of
from rwkvpeft.memory.ways import cheapest_ways, ways_out
from rwkvpeft.memory.work import Speed, Work, measured_speed, work_of_step

__all__ = [
    "OVERHEAD_BYTES",
    "PLAIN_PROGRAMS",
    "Counts",
    "Expected",
    "Least",
    "LevelChoice",
    "MakeAdapter",
    "NoOutline",
    "PartsChoice",
    "Programs",
    "Speed",
    "Work",
    "bytes_kept",
    "cheapest_ways",
    "check_memory",
    "choose_level",
    "choose_parts",
    "count",
    "count_parameters",
    "counts_of",
    "devices_of",
    "expect",
    "expect_levels",
    "fits",
    "free_memory",
    "least_need",
    "measured_speed",
    "memory_of_each",
    "refuse_if_too_large",
    "shares_of",
    "total_memory",
    "training_outline",
    "ways_out",
    "with_level",
    "work_of_step",
]
