"""How much memory a run needs: the least, which is checked before anything is loaded, and what to expect."""

from rwkvpeft.memory.expected import OVERHEAD_BYTES, Expected, expect
from rwkvpeft.memory.least import Least, check_memory, least_need, refuse_if_too_large, ways_out
from rwkvpeft.memory.machine import total_memory
from rwkvpeft.memory.outline import Counts, MakeAdapter, NoOutline, count, count_parameters, counts_of, training_outline

__all__ = [
    "OVERHEAD_BYTES",
    "Counts",
    "Expected",
    "Least",
    "MakeAdapter",
    "NoOutline",
    "check_memory",
    "count",
    "count_parameters",
    "counts_of",
    "expect",
    "least_need",
    "refuse_if_too_large",
    "total_memory",
    "training_outline",
    "ways_out",
]
