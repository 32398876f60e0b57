"""Files that users name, opened with care: regular files alone, and small ones whole within a bound."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from rwkvpeft.errors import UserError

LARGEST_SETTINGS_BYTES = 1 << 17
"""Settings in YAML; Python's reader takes more than a second for each 100 KB."""
LARGEST_RECORD_BYTES = 1 << 24
"""A small record in json, as an adapter's recipe."""

_OTHER_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_file(path: Path | str, what: str = "") -> BinaryIO:
    """A regular file, open for reading bytes. Reading anything else could wait for ever or never end.

    Args:
        what: how a message begins; empty: cannot read PATH.
    Raises: UserError if there is no such file, it is not a regular one or may not be read.
    """
    what = what or f"cannot read {path}"
    try:
        # a pipe without a writer would keep this process waiting here
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as reason:
        raise UserError(what, found=reason.strerror, fix="check the path") from reason
    except ValueError as reason:
        # a NUL in the name
        raise UserError(what, found=reason, fix="check the path") from reason
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for is_kind, name in _OTHER_KINDS if is_kind(mode)), "a special file")
        raise UserError(what, found=kind, expected="a file", fix="check the path")
    return os.fdopen(descriptor, "rb")


def size_of(path: Path | str, what: str = "") -> int:
    """The bytes of a regular file that can be read. Raises: UserError as ``open_file``."""
    with open_file(path, what) as file:
        return os.fstat(file.fileno()).st_size


def read_whole(path: Path | str, largest: int, what: str = "") -> bytes:
    """All of a file that is small by nature.

    Args:
        largest: more bytes than this are not read.
        what: as for ``open_file``.
    Raises: UserError as ``open_file``, also for a larger file or one whose disk fails.
    """
    with open_file(path, what) as file:
        try:
            content = file.read(largest + 1)
        except OSError as reason:
            raise UserError(what or f"cannot read {path}", found=reason.strerror) from reason
        if len(content) > largest:
            size = os.fstat(file.fileno()).st_size
            raise UserError(f"{path} is too large for what it should be", found=f"{size} bytes",
                            expected=f"at most {largest} bytes")
    return content


def read_text(path: Path | str, largest: int, what: str = "", encoding: str = "utf-8") -> str:
    """All of a small text file, with \\n for every kind of line end. Raises: UserError as ``read_whole``, also for
    bytes that are no text in ``encoding``."""
    try:
        text = read_whole(path, largest, what).decode(encoding)
    except UnicodeDecodeError as reason:
        raise UserError(what or f"cannot read {path}", found=f"{reason.reason} at byte {reason.start}",
                        expected=f"text in {encoding.removesuffix('-sig').upper()}") from reason
    return text.replace("\r\n", "\n").replace("\r", "\n")
