"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rwkvpeft.errors import UserError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, flush it to the disk, and rename it into place.

    A crash, a full disk or Ctrl-C at any moment leaves an older ``path`` as it was.
    Raises: UserError if the folder or the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except OSError as reason:
        raise UserError(f"{path} cannot be written", found=reason.strerror or str(reason)) from reason
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
