"""Rows of csv, parquet and json files as records, one at a time.

A csv file is read with Python's own reader, where every value is text: nothing is guessed, so an answer "None" or
"007" stays what it is. Parquet needs pyarrow, which comes with the extra ``data``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkvpeft.config.data_files import is_json_list
from rwkvpeft.data.jsonl import Record, read_records, require_readable
from rwkvpeft.errors import UserError

_LARGEST_FIELD_BYTES = 1 << 30
_ROWS_AT_ONCE = 1024


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
    csv.field_size_limit(_LARGEST_FIELD_BYTES)
    # the mark that spreadsheets put in front is no part of the first column's name
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = next(reader, [])
            if len(set(columns)) != len(columns):
                raise UserError(f"{path} names a column twice", found=columns, expected="a name for each column")
            for row in reader:
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
    except (pyarrow.ArrowException, OSError) as reason:
        found = str(reason).splitlines()[0]
        raise UserError(f"{path} cannot be read as parquet", found=found, fix="copy the file again") from reason


def _listed_rows(path: Path) -> Iterator[Record]:
    try:
        listed: list[Any] = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as reason:
        raise UserError(f"{path} is not valid JSON", found=str(reason), fix="check the file") from reason
    for number, row in enumerate(listed, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: item {number} of the list is no object", found=str(row)[:80])
        yield Record(number, row)
