"""What a run does when something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

from rwkvpeft.config.flags import flag


@dataclass(frozen=True)
class FaultsConfig:
    """What happens when something goes wrong."""

    skip_broken: int = flag(
        8, help="leave out up to so many steps in a row whose loss or gradient is not finite; 0: stop at the first"
    )
    spike: float = flag(
        6.0,
        help="note the documents of a step whose loss lies so many standard deviations above the last hundred; "
        "0: never",
    )
    on_oom: str = flag(
        "stop",
        help="when memory does not suffice; halve: half the --micro_bsz and twice the --accumulate_grad_batches, which "
        "gives the same results but for what dropout draws, from the last resume point (one device)",
        choices=("stop", "halve"),
    )
    read_timeout: float = flag(
        600.0, help="end the run when the data's file system has not answered for so long; 0: never", unit="seconds"
    )
    peer_timeout: float = flag(
        30.0,
        help="end the run when another of its processes, dead or stopped, has not been heard of for so long; one that "
        "is killed on a machine that runs is noticed at once",
        unit="seconds",
    )
