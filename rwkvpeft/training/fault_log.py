"""``faults.jsonl``: one line for each step that was left out or whose loss stood out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvpeft.training.callbacks.lines import LineFile, keep_lines

FAULTS = "faults.jsonl"

_LINES_AT_ONCE = 3
_PAUSE_SECONDS = 60.0


class FaultLog:
    """Writes the file, and tells people of what comes seldom.

    Args:
        folder: where the file goes.
        report: takes a line of text; after some lines there is a minute's pause.
        here: whether this process writes; all others only listen.
    """

    def __init__(self, folder: Path, report: Callable[[str], None], here: Callable[[], bool]) -> None:
        self._path = folder / FAULTS
        self._file = LineFile(self._path, report)
        self._report = report
        self._here = here
        self._told: list[float] = []
        self._silent = 0

    def open(self, step: int) -> None:
        """Cut the file back to where the run goes on."""
        if self._here():
            keep_lines(self._path, lambda line: 0 < json.loads(line)["step"] <= step)

    def add(self, record: dict[str, Any], line: str) -> None:
        """Write ``record``, and tell people ``line`` unless they have just been told others."""
        if not self._here():
            return
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        # the next one may be days away
        self._file.close()
        now = time.monotonic()
        self._told = [at for at in self._told if now - at < _PAUSE_SECONDS]
        if len(self._told) >= _LINES_AT_ONCE:
            self._silent += 1
            return
        before = f" ({self._silent} more before it, see {self._path})" if self._silent else ""
        self._told.append(now)
        self._silent = 0
        self._report(f"warning: {line}{before}")
