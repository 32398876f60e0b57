"""How much memory a run needs: the least, which is checked before anything is loaded, and what to expect."""

from rwkvpeft.memory.dry_run import bytes_kept
from rwkvpeft.memory.expected import Expected, expect
from rwkvpeft.memory.least import Least, check_memory, least_need, refuse_if_too_large, ways_out
from rwkvpeft.memory.levels import LevelChoice, choose_level, expect_levels, fits, with_level
from rwkvpeft.memory.machine import OVERHEAD_BYTES, free_memory, total_memory
from rwkvpeft.memory.outline import (
    Counts,
    MakeAdapter,
    NoOutline,
    Programs,
    count,
    count_parameters,
    counts_of,
    training_outline,
)

__all__ = [
    "OVERHEAD_BYTES",
    "Counts",
    "Expected",
    "Least",
    "LevelChoice",
    "MakeAdapter",
    "NoOutline",
    "Programs",
    "bytes_kept",
    "check_memory",
    "choose_level",
    "count",
    "count_parameters",
    "counts_of",
    "expect",
    "expect_levels",
    "fits",
    "free_memory",
    "least_need",
    "refuse_if_too_large",
    "total_memory",
    "training_outline",
    "ways_out",
    "with_level",
]
