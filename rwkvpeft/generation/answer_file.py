"""A file of answers that grows row by row, so that work on it can be stopped and gone on with."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rwkvpeft.atomic import is_alone_with, write_whole, writing
from rwkvpeft.errors import UserError
from rwkvpeft.reading import LARGEST_RECORD_BYTES, open_file, read_whole

_SETTINGS = ".settings.json"


class AnswerFile:
    """Rows of answers in the order of their numbers, in jsonl, or in csv if the name ends so.

    Beside the file stands ``FILE.settings.json``: what the rows were made with, and which numbers have no row. On the
    next start with the same settings rows are added behind those that are complete.

    Args:
        settings: what the rows depend on, fit for JSON.
        columns: of a csv file.
    Raises: UserError if the file was made with other settings, or by something else; when it is entered also if another
        process writes it.
    """

    def __init__(self, path: Path | str, settings: Mapping[str, Any], columns: Sequence[str]) -> None:
        self.path = Path(path)
        self._beside = settings_path(path)
        self._settings = json.loads(json.dumps(settings))
        self._is_csv = self.path.suffix.lower() == ".csv"
        self._columns = columns
        self._skipped: list[int] = []
        self._file: BinaryIO | None = None
        self._end = self._size = rows = 0
        # an empty one may be left of a process that was stopped before it wrote its settings
        if self.path.exists() and (self.path.stat().st_size or self._beside.exists()):
            self._skipped = _check(self.path, self._settings)
            self._size = self.path.stat().st_size
            self._end, rows = _complete(self.path, self._is_csv)
        self.next_number = _number_behind(max(rows - self._is_csv, 0), self._skipped)
        """The first number that is still to be dealt with."""
        self._skipped = [number for number in self._skipped if number < self.next_number]

    def __enter__(self) -> AnswerFile:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._file = self.path.open("r+b")
        if not is_alone_with(self._file) or self.path.stat().st_size != self._size:
            self._file.close()
            raise UserError(f"another process writes {self.path}", fix="wait for it, or another --output")
        self._write_settings()
        with writing(self.path):
            self._file.truncate(self._end)
            self._file.seek(self._end)
        if self._is_csv and not self._end:
            self._append(self._csv_row(self._columns))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the row of the next number; when this returns the system has it."""
        if self._is_csv:
            self._append(self._csv_row([row[name] for name in self._columns]))
        else:
            # tables hold values that JSON does not know, as dates
            self._append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        self.next_number += 1

    def skip(self) -> None:
        """Leave the next number without a row."""
        self._skipped.append(self.next_number)
        self.next_number += 1
        self._write_settings()

    def _csv_row(self, values: Sequence[Any]) -> str:
        text = io.StringIO()
        csv.writer(text).writerow(values)
        return text.getvalue()

    def _append(self, text: str) -> None:
        assert self._file is not None
        with writing(self.path):
            # half of a surrogate pair, which JSON can name, is no text
            self._file.write(text.encode("utf-8", errors="replace"))
            self._file.flush()

    def _write_settings(self) -> None:
        text = json.dumps({"settings": self._settings, "skipped": self._skipped}, indent=1, ensure_ascii=False)
        write_whole(self._beside, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))


def settings_path(path: Path | str) -> Path:
    """Where the settings of a file of answers stand."""
    return Path(f"{os.fspath(path)}{_SETTINGS}")


def stored_settings(path: Path | str) -> dict[str, Any]:
    """What the rows of a file were made with; nothing if that is not known."""
    beside = settings_path(path)
    return dict(_read_beside(beside)["settings"]) if beside.exists() else {}


def _read_beside(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(read_whole(path, LARGEST_RECORD_BYTES))
        skipped = stored["skipped"]
        if isinstance(stored["settings"], dict) and all(type(number) is int for number in skipped):
            return {"settings": stored["settings"], "skipped": sorted(skipped)}
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"{path} is broken", fix="delete it and the file of answers beside it, or another --output")


def _check(path: Path, settings: Mapping[str, Any]) -> list[int]:
    """The numbers without a row. Raises: UserError if the file's settings are others."""
    beside = settings_path(path)
    if not beside.exists():
        raise UserError(f"{path} is there already, and nothing says what it was made with",
                        expected=f"{beside.name} beside it", fix="another --output, or delete the file")
    stored = _read_beside(beside)
    own = stored["settings"]
    differing = sorted(name for name in {*own, *settings} if own.get(name) != settings.get(name))
    if differing:
        found = "; ".join(f"{name} {own.get(name)!r}, now {settings.get(name)!r}" for name in differing)
        raise UserError(f"{path} belongs to other settings and cannot be gone on with", found=found,
                        fix="the same settings, another --output, or delete the file")
    skipped: list[int] = stored["skipped"]
    return skipped


def _complete(path: Path, is_csv: bool) -> tuple[int, int]:
    """Where the last complete row of a file ends, in bytes, and how many rows are complete, a csv file's head too."""
    end = place = rows = quotes = 0
    with open_file(path) as file:
        for line in file:
            place += len(line)
            # inside double quotes an end of line is a part of a value
            quotes += line.count(b'"') if is_csv else 0
            if line.endswith(b"\n") and quotes % 2 == 0:
                end, rows = place, rows + 1
    return end, rows


def _number_behind(rows: int, skipped: Sequence[int]) -> int:
    """The number behind the last of so many rows, and behind those without a row that follow it."""
    number = rows
    for missing in skipped:
        if missing <= number:
            number += 1
    return number
