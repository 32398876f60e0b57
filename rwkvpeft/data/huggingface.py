"""``--data_type sft``: a dataset of Hugging Face by name, a folder of one, or a csv, parquet or json file.

Its rows become records, and the records documents as those of jsonl files do. Code that comes with a dataset is never
run.

Source of the flags: RWKV-PEFT, ``rwkvt/dataset/SFTdataset.py``; the text is written in the World layout instead of the
"### Instruction" one used there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkvpeft.config.check_sources import TABLES
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.jsonl import Record
from rwkvpeft.data.records import RecordSource, check_weights
from rwkvpeft.data.tables import missing_data_package, read_table
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError

# the files that ``save_to_disk`` writes for a dataset, and for several by their splits
_SAVED = ("state.json", "dataset_dict.json")
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<begin>\d*):(?P<end>\d*)\])?")
_LARGEST_SHOWN = 300


def open_sft(config: DataConfig) -> RecordSource:
    """The documents of ``--data_file`` as ``--sft_field`` and ``--sft_split`` tell.

    Raises: UserError for a file, dataset, split or column that is not there, a missing package, a network that does
        not answer, rows that are no documents, or none at all.
    """
    rows = sft_records(config.data_file, config.sft_split, config.sft_field, config.text_key)
    source = RecordSource(config.data_file, rows, load_tokenizer(config.tokenizer), config.text_key)
    check_weights(source, config)
    return source


def sft_records(name: str, split: str, fields: list[str], text_key: str = "text") -> Iterator[Record]:
    """Rows as records that ``segments`` reads.

    Args:
        name: a file, a folder or the name of a dataset.
        split: as ``train`` or ``train[:1000]``; a single file is the split "train".
        fields: no column: a row is a record as it is; one: that text is the document; two: prompt and answer.
    Raises: UserError as ``open_sft``.
    """
    path = Path(name)
    if path.suffix.lower() in TABLES and not path.is_dir():
        rows = _rows_of_file(path, split)
    else:
        rows = _rows_of_dataset(name, split)
    return _as_records(rows, name, fields, text_key)


def _as_records(rows: Iterable[Record], name: str, fields: list[str], text_key: str) -> Iterator[Record]:
    for line, row in rows:
        absent = [field for field in fields if field not in row]
        if absent:
            other = next((mark for mark in ";\t|" if len(row) == 1 and mark in next(iter(row))), None)
            raise UserError(
                f"{name} has no column {', '.join(absent)}",
                found=f"--sft_field {' '.join(fields)}",
                expected=f"among {', '.join(row)}",
                fix=f"save it with commas between columns, not {other!r}" if other else None,
            )
        values = [_text(row[field], f"{name}:{line}: column {field}") for field in fields]
        if len(values) == 2:
            yield Record(line, _dialogue(*values))
        elif values:
            yield Record(line, {text_key: values[0]})
        else:
            # a table has every column in every row, and says null where a jsonl file has no such field
            yield Record(line, _without_null(row))


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _dialogue(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _text(value: object, place: str) -> str:
    # a column of numbers may well be what is asked for
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{place} must be text", found=repr(value)[:80], fix="--sft_field with columns of text")


def _rows_of_file(path: Path, split: str) -> Iterator[Record]:
    asked = _SPLIT.fullmatch(split)
    if not asked or asked["name"] != "train":
        raise UserError(
            f"{path} has no split {split}", expected="train, or rows of it as train[:1000]", fix="--sft_split train"
        )
    begin, end = (int(asked[group]) if asked[group] else None for group in ("begin", "end"))
    rows = read_table(path)
    return rows if begin is None and end is None else _not_empty(itertools.islice(rows, begin, end), path, split)


def _rows_of_dataset(name: str, split: str) -> Iterator[Record]:
    dataset = _open_dataset(name, split)
    rows = (Record(number, dict(row)) for number, row in enumerate(dataset, start=1))
    return _not_empty(rows, name, split)


def _not_empty(rows: Iterator[Record], name: object, split: str) -> Iterator[Record]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{name} holds no row", found=f"--sft_split {split}")
    return itertools.chain([first], rows)


def _open_dataset(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as reason:
        raise missing_data_package(reason) from reason
    try:
        if any((Path(name) / file).is_file() for file in _SAVED):
            return _saved(datasets, name, split)
        opened: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, split=split)
        return opened
    except (ConnectionError, TimeoutError) as reason:
        raise _cannot_open(name, reason, "check the network, or give the path of a copy on this machine") from reason
    except FileNotFoundError as reason:
        raise _cannot_open(name, reason, "check the path, or the dataset's name on huggingface.co") from reason
    except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as reason:
        # an unknown split, several configurations, code that would have to be run: the library says which
        raise _cannot_open(name, reason, "--sft_split with a split that is there, or a parquet file of it") from reason


def _saved(datasets: Any, name: str, split: str) -> Iterable[Mapping[str, Any]]:
    """What ``save_to_disk`` wrote: splits by name, or one dataset, which counts as any split."""
    asked = _SPLIT.fullmatch(split)
    if not asked:
        raise UserError(f"--sft_split {split} is not a split", expected="train, or rows of it as train[:1000]")
    saved = datasets.load_from_disk(name)
    if hasattr(saved, "keys"):
        if asked["name"] not in saved:
            raise UserError(f"{name} has no split {asked['name']}", expected=sorted(saved))
        saved = saved[asked["name"]]
    rows = range(len(saved))[int(asked["begin"] or 0) : int(asked["end"]) if asked["end"] else None]
    chosen: Iterable[Mapping[str, Any]] = saved.select(rows)
    return chosen


def _cannot_open(name: str, reason: Exception, fix: str) -> UserError:
    found = " ".join(str(reason).split())
    return UserError(f"the dataset {name} cannot be opened", found=found[:_LARGEST_SHOWN], fix=fix)
