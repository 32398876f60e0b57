"""Vocabulary files: those in the format of RWKV's World vocabulary, and RWKV-LM's ``vocab.json`` of characters.

The first have a line ``ID LITERAL LENGTH`` for each token; the literal is Python's notation of a text or of bytes, the
length counts bytes. The others are one JSON object, ``{"0": "a", "1": "b"}``.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path

from rwkvpeft.atomic import write_whole
from rwkvpeft.errors import UserError
from rwkvpeft.reading import read_whole

# the World vocabulary has 65 thousand ids and 1 MB, its longest token 128 bytes
_LARGEST_ID = (1 << 20) - 1
_LARGEST_BYTES = 1 << 26
_LONGEST_LINE = 1 << 13


def read_vocabulary(path: Path) -> list[bytes]:
    """The bytes of every id from 0 to the largest in the file; ids the file does not list have none.

    Literals are parsed, never run.
    Raises: UserError with FILE:LINE for a broken line, an id or a spelling given twice, or the id 0, which ends
        documents.
    """
    spellings: dict[int, bytes] = {}
    owners: dict[bytes, int] = {}
    for number, line in enumerate(read_whole(path, _LARGEST_BYTES).split(b"\n"), start=1):
        line = line.rstrip(b"\r")
        if not line:
            continue
        try:
            token, spelling = _parse(line)
            if token in spellings:
                raise ValueError(f"id {token} is listed twice")
            if owners.setdefault(spelling, token) != token:
                raise ValueError(f"ids {owners[spelling]} and {token} spell the same")
        except (ValueError, SyntaxError, MemoryError, RecursionError) as reason:
            raise UserError(
                f"{path}:{number}: not a line of a vocabulary: {reason}",
                found=line[:80].decode("utf-8", errors="replace"),
                expected="ID LITERAL LENGTH, for instance: 300 ' A' 2",
            ) from reason
        spellings[token] = spelling
    if not spellings:
        raise UserError(f"{path} is empty", expected="a vocabulary file, one token a line")
    table = [b""] * (max(spellings) + 1)
    for token, spelling in spellings.items():
        table[token] = spelling
    return table


def read_characters(path: Path) -> list[str]:
    """The characters of a ``vocab.json`` by id.

    Raises: UserError if the file is anything else, or an id is missing or given twice.
    """
    try:
        listed = json.loads(read_whole(path, _LARGEST_BYTES).decode())
        characters = [listed[str(token)] for token in range(len(listed))]
        whole = bool(characters) and all(isinstance(item, str) and len(item) == 1 for item in characters)
        "".join(characters if whole else ()).encode()
    except (ValueError, KeyError, TypeError, RecursionError) as reason:
        raise _no_characters(path) from reason
    if not whole or len(set(characters)) != len(characters):
        raise _no_characters(path)
    return characters


def write_characters(path: Path, characters: Sequence[str]) -> None:
    """Write a ``vocab.json`` whole or not at all. Raises: UserError if it cannot be written."""
    text = json.dumps(dict(enumerate(characters)), ensure_ascii=False)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _no_characters(path: Path) -> UserError:
    return UserError(f"{path} is not a vocabulary of characters", expected='{"0": "a", "1": "b", ...}, each once')


def same_vocabulary(one: Path, other: Path) -> bool:
    """True if two files hold the same lines, whatever ends them."""
    lines = (read_whole(path, _LARGEST_BYTES).replace(b"\r\n", b"\n").rstrip() for path in (one, other))
    return next(lines) == next(lines)


def _parse(line: bytes) -> tuple[int, bytes]:
    if len(line) > _LONGEST_LINE:
        raise ValueError(f"a line of {len(line)} bytes")
    number, _, rest = line.partition(b" ")
    literal, _, length = rest.rpartition(b" ")
    token = int(number)
    if not 0 < token <= _LARGEST_ID:
        raise ValueError(f"id {token} is outside 1 to {_LARGEST_ID}")
    spelling = _literal(literal)
    if len(spelling) != int(length):
        raise ValueError(f"the token has {len(spelling)} bytes, the line says {int(length)}")
    if not spelling:
        raise ValueError("the token is empty")
    return token, spelling


def _literal(literal: bytes) -> bytes:
    # almost every line is a quoted text without escapes, and parsing 65 thousand of them would take half a second
    quote = literal[:1]
    if quote in (b"'", b'"') and literal[-1:] == quote and b"\\" not in literal and literal.count(quote) == 2:
        return literal[1:-1]
    value = ast.literal_eval(literal.decode("utf-8").strip())
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, bytes):
        return value
    raise ValueError(f"the literal is {type(value).__name__}, not text or bytes")
