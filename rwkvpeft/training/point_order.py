"""Which resume point is the newest, told without reading one. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = "resume.json"
"""The file of a point that says where the run stood."""


def newest_first(folder: Path) -> list[Path]:
    """The points in a folder. Those of a later start of the command come first whatever their step: it may have begun
    anew, or gone back behind a point that was broken. Broken ones come before all: whoever passes them over says so."""
    starts = _starts(folder)
    return sorted(starts, key=lambda path: (starts[path] is None, starts[path] or 0, path.name), reverse=True)


def next_start(folder: Path) -> int:
    """The number of a start whose points are to be newer than all in ``folder``."""
    return 1 + max((start for start in _starts(folder).values() if start is not None), default=0)


def _starts(folder: Path) -> dict[Path, int | None]:
    """Each point's start, None where a broken one does not tell."""
    return {path: _start_of(path) for path in folder.glob("step-*")}


def _start_of(path: Path) -> int | None:
    try:
        start = json.loads((path / RECORD).read_text(encoding="utf-8")).get("start", 0)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return start if isinstance(start, int) else None
