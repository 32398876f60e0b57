"""Rows of csv, parquet and json files as records, one at a time.

A csv file is read with Python's own reader, where every value is text: nothing is guessed, so an answer "None" or
"007" stays what it is. Parquet needs pyarrow, which comes with the extra ``data``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rwkvpeft.config.data_files import is_json_list
from rwkvpeft.data.jsonl import Record, read_records, require_readable
from rwkvpeft.errors import UserError
from rwkvpeft.reading import open_file

_LARGEST_ROW = 1 << 25
_READ_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 1024
_BLANKS = re.compile(r"[ \t\r\n]*")


def read_table(path: str | Path) -> Iterator[Record]:
    """The rows of a file in order, by column; the number of a record is its line in csv and jsonl, elsewhere its row
    counted from 1. Of a list in a json file the rows are its objects.

    Raises: UserError if the file cannot be opened or is broken, holds no row, or needs a package that is missing.
    """
    path = Path(path)
    require_readable(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        rows = _csv_rows(path)
    elif suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        rows = _listed_rows(path) if suffix == ".json" and is_json_list(path) else read_records(path)
    return _some(rows, path)


def missing_data_package(found: object) -> UserError:
    """The error for a reader that is not installed."""
    return UserError("a package that reads these data is not installed", found=found, fix="pip install '.[data]'")


def _some(rows: Iterator[Record], path: Path) -> Iterator[Record]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"{path} holds no row", fix="check the file")


def _csv_rows(path: Path) -> Iterator[Record]:
    csv.field_size_limit(_LARGEST_ROW)
    # the mark that spreadsheets put in front is no part of the first column's name
    with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
        lines = _Lines(file, path)
        reader = csv.reader(lines, strict=True)
        try:
            columns = next(reader, [])
            if len(set(columns)) != len(columns):
                raise UserError(f"{path} names a column twice", found=columns, expected="a name for each column")
            for row in reader:
                lines.taken = 0
                if not row:
                    continue
                if len(row) != len(columns):
                    raise UserError(
                        f"{path}:{reader.line_num}: a row of {len(row)} values under {len(columns)} names",
                        expected="a comma between values, and texts with commas or line ends in double quotes",
                    )
                yield Record(reader.line_num, dict(zip(columns, row, strict=True)))
        except csv.Error as reason:
            raise UserError(f"{path}:{reader.line_num}: not csv: {reason}") from reason
        except UnicodeDecodeError as reason:
            raise UserError(f"{path} is not UTF-8", found=str(reason), fix="save it as UTF-8") from reason


class _Lines:
    """The lines of a file, as long as those of one row are not too many characters: a reader holds them all.

    Attributes:
        taken: characters read for the present row; who reads the rows sets it back.
    """

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path, self._number = file, path, 0
        self.taken = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_LARGEST_ROW):
            self._number += 1
            self.taken += len(line)
            if self.taken >= _LARGEST_ROW:
                raise UserError(f"{self._path}:{self._number}: a row of more than {_LARGEST_ROW} characters",
                                fix="is a double quote missing?")
            yield line


def _parquet_rows(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as reason:
        raise missing_data_package(reason) from reason
    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, row)
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError, TypeError) as reason:
        found = (str(reason).splitlines() or [type(reason).__name__])[0]
        raise UserError(f"{path} cannot be read as parquet", found=found, fix="copy the file again") from reason


def _listed_rows(path: Path) -> Iterator[Record]:
    """The objects of one list, each read by itself, so that memory is bounded by the largest."""
    number = 0
    with io.TextIOWrapper(open_file(path), encoding="utf-8-sig") as file:
        try:
            for number, row in enumerate(_items(file), start=1):
                if not isinstance(row, dict):
                    raise UserError(f"{path}: item {number} of the list is no object", found=repr(row)[:80])
                yield Record(number, row)
        except (ValueError, RecursionError) as reason:
            raise UserError(f"{path} is not valid JSON behind item {number} of its list", found=str(reason),
                            fix="check the file") from reason


class _Window:
    """The part of a text that is looked at; what lies before it is forgotten."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._place = "", 0
        self._decoder = json.JSONDecoder()

    def next_letter(self) -> str:
        """The next character that is no blank, which stays; empty at the end."""
        while True:
            self._place = _BLANKS.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            self._text, self._place = self._file.read(_READ_AT_ONCE), 0
            if not self._text:
                return ""

    def skip_letter(self) -> None:
        """Go on behind the next character."""
        self._place += 1

    def value(self) -> Any:
        """The value that begins here, read on as far as needed. Raises: ValueError if there is none."""
        step = _READ_AT_ONCE
        while True:
            try:
                item, end = self._decoder.raw_decode(self._text, self._place)
                # a number may go on behind what has been read
                if end < len(self._text):
                    self._place = end
                    return item
            except json.JSONDecodeError as reason:
                if len(self._text) - self._place > _LARGEST_ROW:
                    # its place is one in the window
                    raise ValueError(reason.msg) from reason
            # twice as much each time: what was read is looked at anew
            more = self._file.read(step)
            step *= 2
            self._text, self._place = self._text[self._place :] + more, 0
            if not more:
                return self._last_value()

    def _last_value(self) -> Any:
        try:
            item, self._place = self._decoder.raw_decode(self._text)
        except json.JSONDecodeError as reason:
            raise ValueError(reason.msg) from reason
        return item


def _items(file: TextIO) -> Iterator[Any]:
    """The items of a JSON list. Raises: ValueError where it is none, RecursionError where one is nested too deeply."""
    window = _Window(file)
    window.next_letter()
    window.skip_letter()
    while window.next_letter() != "]":
        yield window.value()
        if window.next_letter() == ",":
            window.skip_letter()
            if window.next_letter() == "]":
                raise ValueError("a comma before the end of the list")
        elif window.next_letter() != "]":
            raise ValueError("no comma between two items" if window.next_letter() else "the list does not end")
    window.skip_letter()
    if window.next_letter():
        raise ValueError("something behind the end of the list")
