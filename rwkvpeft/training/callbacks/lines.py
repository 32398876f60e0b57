"""Files of one line for each event, cut back when a run goes on from an earlier step."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvpeft.atomic import writing

_MOST_WAITING = 100_000


class LineFile:
    """A file that gets a line for each event, and ends no run when it cannot be written.

    Lines that a full disk refuses wait, and are written when there is room again; the user is told once. A folder that
    was deleted is made anew, with the lines from there on. A file never ends in half a line that was refused.

    Args:
        report: takes a line of text.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path = path
        self._report = report
        self._file: int | None = None
        self._waiting: deque[str] = deque(maxlen=_MOST_WAITING)
        self._told = False

    def write(self, line: str) -> None:
        """Add ``line``, which ends in a newline; it is with the system when this returns."""
        self._waiting.append(line)
        try:
            self._write_all()
        except OSError as reason:
            # opened anew for the next line: the file system may have come back as another one
            self.close()
            if not self._told:
                self._told = True
                self._report(
                    f"warning: cannot write {self.path} ({reason.strerror}); training goes on, and lines are added "
                    "when that is possible again"
                )

    def _write_all(self) -> None:
        file = self._opened()
        length = os.fstat(file).st_size
        data = "".join(self._waiting).encode()
        try:
            # a full disk takes a part, and says why it takes no more when it is given the rest
            while data:
                data = data[os.write(file, data) :]
        except OSError:
            os.ftruncate(file, length)
            raise
        self._waiting.clear()

    def _opened(self) -> int:
        if self._file is not None and os.fstat(self._file).st_nlink == 0:
            self.close()
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        return self._file

    def close(self) -> None:
        """Close the file, if it is open; a further line opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def keep_lines(path: Path, wanted: Callable[[str], bool]) -> None:
    """Drop a file's lines from the first that is not wanted, or cannot be read, on.

    Raises: UserError if the file cannot be changed.
    """
    if not path.exists():
        return
    with writing(path):
        kept = _first_lines(path, wanted)
        if kept < path.stat().st_size:
            # nothing is written: a full disk does not matter, and a crash leaves one length or the other
            os.truncate(path, kept)


def read_records(path: Path, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file, up to those of ``last_step`` if it is given; none if there is no file."""
    records: list[dict[str, Any]] = []

    def take(line: str) -> bool:
        record = json.loads(line)
        if last_step is not None and record["step"] > last_step:
            return False
        records.append(record)
        return True

    if path.exists():
        _first_lines(path, take)
    return records


def _first_lines(path: Path, wanted: Callable[[str], bool]) -> int:
    """Bytes of the lines before the first that is not wanted."""
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or not wanted(line.decode("utf-8", "replace")):
                    break
            except (ValueError, KeyError, IndexError, TypeError):
                # the half line of a crash
                break
            kept += len(line)
    return kept
