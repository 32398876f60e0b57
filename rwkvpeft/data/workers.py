"""Processes that prepare batches: which signals they leave to the training process, and how their errors arrive."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from torch.utils.data import get_worker_info

from rwkvpeft.errors import UserError

_Item = TypeVar("_Item")


def leave_signals(worker: int) -> None:
    """Make this data worker outlive what a terminal or a scheduler sends to all processes: the training process alone
    decides how to end, and needs batches until it has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_at_the_second())


def _end_at_the_second() -> Callable[[int, FrameType | None], None]:
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        # the second one comes from PyTorch, which ends workers that do not end by themselves
        seen.append(number)
        if len(seen) > 1:
            os._exit(1)

    return handle


def made(make: Callable[[], _Item]) -> _Item | UserError:
    """What ``make`` gives; in a data worker also its UserError, which PyTorch would hand on as a traceback."""
    try:
        return make()
    except UserError as error:
        if get_worker_info() is None:
            raise
        return error


def worker_died(reason: RuntimeError) -> UserError | None:
    """The error for people if PyTorch says that a data worker is gone; None if it says something else."""
    text = str(reason)
    if "DataLoader worker" not in text:
        return None
    return UserError(
        "a process that prepares batches has died",
        found=text.splitlines()[0],
        fix="fewer --num_workers or a smaller --prefetch_factor if the system killed it for memory; the same command "
        "goes on from the last resume point",
    )
