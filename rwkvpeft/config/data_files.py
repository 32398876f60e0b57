"""``--data_file``: one file, or several with the share that each has in what is drawn."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from rwkvpeft.config.check_sources import check_source_file, check_sources
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.errors import UserError
from rwkvpeft.reading import open_file

# no letter may follow the colon, as it does in C:\data
_SHARE = re.compile(r":(\d+(?:\.\d+)?|\.\d+)$")
_JSONL = (".jsonl", ".json")
_TABLES = (".parquet", ".csv")
# what a name suggests to a reader; only --data_type decides, because binidx may have any name
_SUGGESTED = {".txt": "utf-8", ".npy": "numpy", ".npz": "numpy"}
# a colon that is not that of C:\data
_NO_SHARE = re.compile(r"(.+):([^:/\\]*)")


class DataFile(NamedTuple):
    """A part of the data: a path, or what else ``--data_type`` takes, and its share relative to the other parts."""

    path: str
    share: Fraction


def data_files(data_file: str) -> list[DataFile]:
    """The parts of ``--data_file``, ``PATH:SHARE`` with commas between them; a share that is left out is 1.

    Raises: UserError for an empty path or a share of 0.
    """
    parts = [_part(text.strip()) for text in data_file.split(",")]
    for part in parts:
        if not part.path or not part.share:
            raise UserError(
                "--data_file: each part needs a path and a share above 0",
                found=data_file,
                expected="a.jsonl:3,b.jsonl:1",
            )
    return parts


def _part(text: str) -> DataFile:
    found = _SHARE.search(text)
    return DataFile(text[: found.start()], Fraction(found[1])) if found else DataFile(text, Fraction(1))


def format_of(path: str, data_type: str) -> str:
    """The format of one part: what its name tells, otherwise ``data_type``."""
    suffix = Path(path).suffix.lower()
    if suffix in _TABLES:
        return "sft"
    if suffix == ".json" and data_type in ("binidx", "jsonl"):
        return "sft" if is_json_list(path) else "jsonl"
    return "jsonl" if suffix == ".jsonl" and data_type != "sft" else data_type


def is_json_list(path: str | Path) -> bool:
    """Whether a file is one JSON list of records, and not one record a line; False if it cannot be read."""
    try:
        with open_file(path) as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except (OSError, UserError):
        return False


def without_suffix(data_file: str) -> str:
    """``--data_file`` with PREFIX where PREFIX.bin or PREFIX.idx was given."""
    parts = [re.sub(r"\.(bin|idx)(?=$|:[\d.]+$)", "", text) for text in data_file.split(",")]
    return ",".join(parts)


def is_jsonl(data_file: str) -> bool:
    """Whether every part is named as jsonl files are."""
    return all(part.path.endswith(_JSONL) for part in data_files(data_file))


def check_data_files(data: DataConfig, findings: Findings) -> None:
    """Note every part of ``--data_file`` that is not there, and every setting that their formats do not honour."""
    try:
        parts = data_files(data.data_file)
    except UserError as error:
        findings.errors.append(error)
        return
    for part in parts:
        _check_part(part.path, format_of(part.path, data.data_type), parts, findings)
    check_sources(data, [format_of(part.path, data.data_type) for part in parts], findings)


def _check_part(path: str, data_type: str, parts: Sequence[DataFile], findings: Findings) -> None:
    if data_type not in ("binidx", "jsonl"):
        check_source_file(path, data_type, findings)
        return
    missing = _missing(path, data_type)
    if not missing:
        return
    misread = _NO_SHARE.fullmatch(path)
    if misread and not _missing(misread[1], format_of(misread[1], data_type)):
        findings.add("--data_file: what stands behind a colon is the file's share", found=path,
                     expected="a number above 0: a.jsonl:3,b.jsonl:1")
        return
    suggested = "sft" if os.path.isdir(path) else _SUGGESTED.get(Path(path).suffix.lower())
    fix = "check the path; --data_file is the path without .bin and .idx"
    if data_type != "binidx":
        fix = "check the path"
    elif suggested and os.path.exists(path):
        fix = f"--data_type {suggested}"
    elif os.path.isfile(path) or os.path.isfile(f"{path}.jsonl"):
        fix = "--data_type jsonl, or python make_data.py FILE.jsonl first"
    elif len(missing) == 1:
        fix = "both files belong together: copy the missing one, or make them again with make_data.py"
    if len(parts) > 1:
        fix += "; a comma in --data_file stands between files"
    findings.add("--data_file: a file is missing", found=f"no {' and no '.join(missing)}", fix=fix)


def _missing(path: str, data_type: str) -> list[str]:
    names = [f"{path}.bin", f"{path}.idx"] if data_type == "binidx" else [path]
    return [name for name in names if not os.path.isfile(name)]
