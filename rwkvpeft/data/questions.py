"""Files of questions to be answered: records in several layouts, rows of tables, or lines of text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from rwkvpeft.data.jsonl import LARGEST_LINE_BYTES, Record
from rwkvpeft.data.layouts import RecordError
from rwkvpeft.data.pair_source import record_error
from rwkvpeft.data.prompt_source import read_prompt
from rwkvpeft.data.tables import read_table
from rwkvpeft.data.template import ASSISTANT, RESPONSE
from rwkvpeft.errors import UserError
from rwkvpeft.reading import open_file

Layout = Literal["chat", "instruction", "text"]

_TABLES = (".jsonl", ".json", ".csv", ".parquet")
_LAYOUTS: tuple[tuple[str, Layout], ...] = ((f"{ASSISTANT}:", "chat"), (f"{RESPONSE}:", "instruction"))


class Question(NamedTuple):
    """``text`` is what a model reads, up to where its answer begins; ``layout`` the turns it ends in, "text" for one
    that is gone on with as it is."""

    record: Record
    text: str
    layout: Layout


def read_questions(path: Path | str) -> Iterator[Question]:
    """The questions of a file in order.

    Records of ``.jsonl``, ``.json``, ``.csv`` and ``.parquet`` are asked as ``prompt_source.read_prompt`` reads them,
    which training with rewards does too. In any other file every line that is not blank is one question, and its record
    is ``{"prompt": line}``.

    Raises: UserError as FILE:LINE for what is no question, and if there is none.
    """
    path = Path(path)
    for record in read_table(path) if path.suffix.lower() in _TABLES else _lines(path):
        try:
            text = read_prompt(record.value).text
        except (RecordError, RecursionError) as reason:
            raise record_error(str(path), record, reason) from reason
        yield Question(record, text, next((layout for end, layout in _LAYOUTS if text.endswith(end)), "text"))


def _lines(path: Path) -> Iterator[Record]:
    found = False
    with open_file(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline=None) as file:
        try:
            number = 0
            while line := file.readline(LARGEST_LINE_BYTES):
                number += 1
                if len(line) >= LARGEST_LINE_BYTES:
                    raise UserError(f"{path}:{number}: a line of {LARGEST_LINE_BYTES:,} characters or more",
                                    fix="a question a line; texts with line ends in them go into a .jsonl file")
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
