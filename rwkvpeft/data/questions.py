"""Files of questions to be answered: records in several layouts, rows of tables, or lines of text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rwkvpeft.data.jsonl import LARGEST_LINE_BYTES, SHOWN, Record, excerpt
from rwkvpeft.data.layouts import RecordError, as_text, read_turns
from rwkvpeft.data.tables import read_table
from rwkvpeft.data.template import ASSISTANT, RESPONSE, USER, Turn, render
from rwkvpeft.errors import UserError
from rwkvpeft.reading import open_file

Layout = Literal["chat", "instruction", "text"]

_TABLES = (".jsonl", ".json", ".csv", ".parquet")
_TURN_LISTS = ("messages", "conversations")
# a question, and the name its answer has in the layouts of data
_ASKED = {"prompt": "completion", "question": "answer", "query": "response"}
_BESIDE = ("system", "system_prompt", "tools", "functions")
_EXPECTED = (*_ASKED, *_TURN_LISTS, "instruction", "text")


class Question(NamedTuple):
    """``text`` is what a model reads, up to where its answer begins; ``layout`` the turns it is written in, none for a
    text that is gone on with as it is. ``record`` is what stands in ``line`` of the file, counted from 1."""

    line: int
    record: dict[str, Any]
    text: str
    layout: Layout


def read_questions(path: Path | str) -> Iterator[Question]:
    """The questions of a file in order.

    In ``.jsonl``, ``.json``, ``.csv`` and ``.parquet`` a record has one of these, the first of them is asked:
    ``prompt``, ``question`` or ``query`` (a text, or a list of messages), ``messages`` or ``conversations`` (asked up
    to the last user's turn), ``instruction`` with ``input``; or ``text``, which is gone on with as it is. What a system
    says and functions stand beside them as in training data. In any other file every line that is not blank is one
    question, and its record is ``{"prompt": line}``.

    Raises: UserError as FILE:LINE for what is no question, and if there is none.
    """
    path = Path(path)
    for record in read_table(path) if path.suffix.lower() in _TABLES else _lines(path):
        try:
            text, layout = _read(record.value)
        except (RecordError, RecursionError) as reason:
            raise record_error(path, record.line, record.value, str(reason)) from reason
        yield Question(record.line, record.value, text, layout)


def record_error(
    path: Path | str, line: int, record: Mapping[str, Any], what: str, fix: str | None = None
) -> UserError:
    """The error for one record of a file, with its beginning."""
    shown = json.dumps(record, ensure_ascii=False, default=str)[:SHOWN]
    return UserError(f"{path}:{line}: {what}", found=excerpt(shown.encode("utf-8", errors="replace")), fix=fix)


def _lines(path: Path) -> Iterator[Record]:
    found = False
    with open_file(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline=None) as file:
        try:
            number = 0
            while line := file.readline(LARGEST_LINE_BYTES):
                number += 1
                text = line.strip()
                if text.startswith('{"'):
                    raise UserError(f"{path}:{number}: this looks like JSON", found=text[:80],
                                    fix="give the file a name that ends in .jsonl")
                if text:
                    found = True
                    yield Record(number, {"prompt": text})
        except UnicodeDecodeError as reason:
            raise UserError(f"{path} is not UTF-8", found=str(reason), fix="save it as UTF-8") from reason
    if not found:
        raise UserError(f"{path} holds no line", expected="a question a line")


def _read(record: Mapping[str, Any]) -> tuple[str, Layout]:
    asked = next((name for name in _EXPECTED if record.get(name) is not None), None)
    if asked is None:
        found = ", ".join(f'"{name}"' for name in record) or "no field"
        raise RecordError(f"no question in this record; found {found}; expected one of {', '.join(_EXPECTED)}")
    value = record[asked]
    beside = {name: record[name] for name in _BESIDE if name in record}
    if asked == "text":
        return _filled(value, asked), "text"
    if asked == "instruction":
        parts = {name: record[name] for name in ("input", "context") if name in record}
        turns = read_turns({"instruction": _filled(value, asked), **parts, "output": "", **beside})
        return _begun(turns[:-1], RESPONSE), "instruction"
    if asked in _ASKED and not isinstance(value, (list, tuple)):
        turns = read_turns({asked: _filled(value, asked), _ASKED[asked]: "", **beside})
        return _begun(turns[:-1], ASSISTANT), "chat"
    turns = read_turns({asked if asked in _TURN_LISTS else "messages": value, **beside})
    last = max((place for place, turn in enumerate(turns) if turn.header == USER), default=None)
    if last is None:
        raise RecordError(f'field "{asked}" has no turn of a user to answer')
    return _begun(turns[: last + 1], ASSISTANT), "chat"


def _filled(value: object, name: str) -> str:
    text = as_text(value, f'field "{name}"')
    if not text.strip():
        raise RecordError(f'field "{name}" is empty')
    return text


def _begun(turns: list[Turn], header: str) -> str:
    """Turns up to where the answer to them begins."""
    return "".join(piece.text for piece in render([*turns, Turn(header, "")]))
