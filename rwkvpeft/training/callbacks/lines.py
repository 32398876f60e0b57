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
    if not path.exists():
        return []

    def wanted(line: str) -> bool:
        step = json.loads(line)["step"]
        return last_step is None or step <= last_step

    return [json.loads(line) for line in _first_lines(path, wanted)]


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
