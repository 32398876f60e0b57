"""Files of JSON objects, one a line, read with errors that name file, line and cause.

Lines end at LF, CR or CRLF and nowhere else: U+2028 and U+0085 are characters of a document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rwkvpeft.errors import UserError
from rwkvpeft.reading import open_file

BLOCK_BYTES = 1 << 22
_SEARCHED_AT_ONCE = 1 << 16
SHOWN = 80
LARGEST_LINE_BYTES = 1 << 25
"""A longer line is refused: it is eight million tokens, many times the longest context, and the objects it could hold
would take twenty-five times its size."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Record(NamedTuple):
    """One JSON object and the line it stands in, counted from 1."""

    line: int
    value: dict[str, Any]


class BadLine(ValueError):
    """A line that is not a record; the message says why, in one line without file and number."""


def read_records(path: str | Path, skip_bad: bool = False) -> Iterator[Record]:
    """The records of a jsonl file in order; blank lines are passed over. Memory is bounded by the longest line.

    Args:
        skip_bad: pass over lines that are not JSON objects too.
    Raises:
        UserError: the file cannot be opened, holds no record, or a line is bad (``FILE:LINE: what is wrong``).
    """
    path = Path(path)
    line, found = 0, False
    for start, end in blocks(path):
        for raw in read_block(path, start, end):
            line += 1
            try:
                value = parse_line(raw)
            except BadLine as reason:
                if skip_bad:
                    continue
                raise line_error(path, line, str(reason), excerpt(raw)) from reason
            if value is not None:
                found = True
                yield Record(line, value)
    if not found:
        raise UserError(f"{path} holds no record", found=f"{line} lines", expected="JSON objects, one a line")


def line_error(path: Path | str, line: int, what: str, shown: str) -> UserError:
    """The error for one line of a file."""
    return UserError(f"{path}:{line}: {what}", found=shown)


def excerpt(raw: bytes) -> str:
    """The first 80 characters of a line, fit for a terminal."""
    shown = raw[: 4 * SHOWN].decode("utf-8", errors="replace").strip()[:SHOWN]
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in shown
    )


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None for a blank one. Raises: BadLine if it holds anything else, or is too long."""
    if len(raw) > LARGEST_LINE_BYTES:
        raise BadLine(f"longer than {LARGEST_LINE_BYTES >> 20} MiB; cut the document into several")
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError as reason:
        wide = "; the file looks like UTF-16, save it as UTF-8" if raw.startswith(_WIDE_MARKS) else ""
        raise BadLine(f"invalid UTF-8 at byte {reason.start} of the line{wide}") from reason
    if not text:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as reason:
        raise BadLine(f"not valid JSON: {reason.msg} at character {reason.pos}") from reason
    except RecursionError as reason:
        raise BadLine("nested too deeply to be read") from reason
    except ValueError as reason:
        # a number of more digits than Python converts
        raise BadLine(f"not readable JSON: {reason}") from reason
    if not isinstance(value, dict):
        raise BadLine(f"not a JSON object but {_KINDS.get(type(value), 'a number')}")
    return value


_KINDS = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}


def blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Byte ranges that cut a file at ends of lines, each of ``block_bytes`` or up to the end of its last line.

    Raises: UserError if the file cannot be opened.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
        start = 0
        while start < size:
            end = _line_end(file, start + block_bytes, size)
            yield start, end
            start = end


def require_readable(path: Path) -> None:
    """Raises: UserError if this is no regular file, or it cannot be opened for reading."""
    open_file(path).close()


def read_block(path: Path, start: int, end: int) -> list[bytes]:
    """The lines of a range that ``blocks`` gave, without their ends and the byte order mark a file may start with.

    Of a last line that is too long, no more than shows that it is.
    """
    with open_file(path) as file:
        file.seek(start)
        block = file.read(min(end - start, BLOCK_BYTES + LARGEST_LINE_BYTES + 1))
    if start == 0:
        block = block.removeprefix(_BYTE_ORDER_MARK)
    # of bytes, splitlines takes LF, CR and CRLF only; of text it would take ten more
    return block.splitlines()


def _line_end(file: BinaryIO, position: int, size: int) -> int:
    """The first end of a line at or after ``position``, which is the file's end if there is none."""
    position -= 1
    while position < size:
        file.seek(position)
        # one byte more than is searched, to see the LF behind a CR
        part = file.read(_SEARCHED_AT_ONCE + 1)
        searched = part[:_SEARCHED_AT_ONCE]
        ends = [place for place in (searched.find(b"\n"), searched.find(b"\r")) if place >= 0]
        if ends:
            end = min(ends) + 1
            is_pair = part[end - 1 : end + 1] == b"\r\n"
            return position + end + is_pair
        position += _SEARCHED_AT_ONCE
    return size
