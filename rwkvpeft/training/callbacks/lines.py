"""Files of one line for each event, cut back when a run goes on from an earlier step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvpeft.atomic import write_whole


def keep_lines(path: Path, wanted: Callable[[str], bool]) -> None:
    """Drop a file's lines from the first that is not wanted, or cannot be read, on."""
    if not path.exists():
        return
    kept = "".join(_first_lines(path, wanted))
    write_whole(path, lambda partial: partial.write_text(kept, encoding="utf-8"))


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


def _first_lines(path: Path, wanted: Callable[[str], bool]) -> list[str]:
    kept = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                if not line.endswith("\n") or not wanted(line):
                    break
            except (ValueError, KeyError, IndexError, TypeError):
                # the half line of a crash
                break
            kept.append(line)
    return kept
