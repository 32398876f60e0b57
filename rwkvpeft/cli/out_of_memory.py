"""When memory does not suffice: one message with ways out, or the same run again in smaller batches."""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.splitting_batches import possible_parts
from rwkvpeft.errors import UserError

# what PyTorch, CUDA, its libraries and the C++ runtime say
_NO_MEMORY = (
    "not enough memory", "out of memory", "can't allocate memory", "cannot allocate memory",
    "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "bad_alloc", "unable to mmap",
)


def is_out_of_memory(reason: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, on any device."""
    if isinstance(reason, MemoryError):
        return True
    if isinstance(reason, OSError):
        return reason.errno == errno.ENOMEM
    return isinstance(reason, RuntimeError) and any(words in str(reason).lower() for words in _NO_MEMORY)


def out_of_memory(config: TrainConfig, found: str) -> UserError:
    """The error for people, with the cheapest ways out."""
    from rwkvpeft.cli.fit_to_memory import ways_to_save

    return UserError(
        "there is not enough memory for this run",
        found=found,
        fix=", or ".join(ways_to_save(config)) or "a smaller model or a larger machine",
    )


class Attempts:
    """A run that is tried again in smaller batches as long as memory does not suffice and ``--on_oom`` wants it.

    Args:
        asked: the settings as the user gave them.
        say: takes a line of text.
    """

    def __init__(self, asked: TrainConfig, say: Callable[[str], None]) -> None:
        self._asked = asked
        self._say = say
        self._points = _points(asked)
        self._parts: int | None = None

    def run(self, attempt: Callable[[TrainConfig], None]) -> None:
        """Call ``attempt`` with the settings, and after each failure that smaller batches may mend with smaller ones.

        Raises: UserError if memory does not suffice and no attempt is left; whatever else ``attempt`` raises.
        """
        config = self._asked
        while True:
            found = _failure(attempt, config)
            if found is None:
                return
            # the exception held every frame of the failed attempt, and so its model
            _free()
            smaller = self._smaller()
            if smaller is None:
                raise out_of_memory(config, found)
            config = smaller

    def tried(self, rows: int) -> None:
        """Note how many rows at once the attempt takes."""
        self._parts = self._asked.schedule.micro_bsz // rows

    def _smaller(self) -> TrainConfig | None:
        """The settings of the next attempt, with at most half the rows at once; None if there is none."""
        schedule = self._asked.schedule
        if self._asked.faults.on_oom != "halve" or self._parts is None:
            return None
        parts = next((parts for parts in possible_parts(schedule.micro_bsz) if parts >= 2 * self._parts), None)
        if parts is None:
            return None
        # a run that was to start anew has by now points of its own
        begun = _points(self._asked) != self._points
        where = "the last resume point" if begun or self._asked.output.resume != "none" else "the beginning"
        self._say(
            f"out of memory: going on from {where} with --micro_bsz {schedule.micro_bsz // parts} "
            f"--accumulate_grad_batches {schedule.accumulate_grad_batches * parts}, the same rows in each step"
        )
        output = replace(self._asked.output, resume="auto") if begun else self._asked.output
        return replace(self._asked, output=output, schedule=replace(schedule, micro_split=str(parts)))


def _failure(attempt: Callable[[TrainConfig], None], config: TrainConfig) -> str | None:
    """What was said of the lack of memory; None if the attempt went well."""
    try:
        attempt(config)
    except (RuntimeError, MemoryError, OSError) as reason:
        if not is_out_of_memory(reason):
            raise
        lines = str(reason).strip().splitlines()
        return lines[0] if lines else type(reason).__name__
    return None


def _free() -> None:
    import torch

    gc.collect()
    # glibc keeps what has been freed, which other processes may need
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _points(config: TrainConfig) -> set[tuple[str, int]]:
    """The resume points of the run, as they were written."""
    folder = Path(config.output.proj_dir) / "resume"
    return {(str(path), path.stat().st_mtime_ns) for path in folder.glob("step-*")}
