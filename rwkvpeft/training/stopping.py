"""A clean end when somebody asks for one: Ctrl-C, a scheduler's SIGTERM, or SLURM's SIGUSR1 some time before it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import pytorch_lightning as pl

# SIGUSR1 is what sbatch --signal=USR1@120 sends; Windows lacks it
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
# a launcher passes on the Ctrl-C that the terminal has given every process
_SAME_PRESS_SECONDS = 0.2


def end_process(message: str) -> None:
    """End this process and its data workers at once, from any thread, with exit code 2.

    Of files nothing is left half written: they appear whole or not at all.
    """
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(2)


class StopSignals:
    """Listens while a ``with`` block lasts: the first signal asks for an end after the step, a second Ctrl-C ends at
    once, with a KeyboardInterrupt.

    A second SIGTERM does nothing more: timeout(1) and schedulers signal a process and its group.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._process = os.getpid()
        self._first: float | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, reason: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def keep_from(self, trainer: pl.Trainer) -> None:
        """Keep Lightning from listening to the same signals.

        It would talk to the other processes from inside the handler, in the middle of their steps, end without a
        resume point, and put jobs of SLURM back into the queue.
        """
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # a data worker that has just been forked: the training process decides
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now
            # what a signal meets in the middle of another line cannot be written, and must not end the run
            with contextlib.suppress(RuntimeError):
                self._report("stopping after this step; Ctrl-C once more to stop at once, unsaved")
        elif number == signal.SIGINT and now - self._first > _SAME_PRESS_SECONDS:
            raise KeyboardInterrupt
