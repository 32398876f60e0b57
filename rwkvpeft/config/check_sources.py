"""What each ``--data_type`` takes: defaults, settings that go together, and files that must be there."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig

TEXTS = ("utf-8", "utf-16le", "dummy")
"""Kinds of which the whole data are one text."""

STREAMS = (*TEXTS, "numpy", "uint16")
"""Kinds without documents of their own, which are read in windows unless told otherwise."""

TABLES = (".csv", ".parquet", ".jsonl", ".json")
"""Ends of the names of files that ``--data_type sft`` reads without the ``datasets`` package."""

_DUMMY = "dummy"
_VOCABULARY = "vocab.json"
_FIX_INSTALL = "pip install '.[data]'"


def by_source(values: dict[str, Any]) -> None:
    """Fill in what ``--data_type`` decides where it was not given."""
    kind = values.get("data_type")
    if kind == "dummy":
        values["data_file"] = values.get("data_file") or _DUMMY
    if kind in STREAMS and not values.get("my_sample_len"):
        values.setdefault("dataload", "get")
    if kind in TEXTS:
        values.setdefault("tokenizer", _vocabulary_path(values))
    if len(values.get("sft_field", [])) == 2:
        # as in RWKV-PEFT, which trains the second column and reads the first
        values.setdefault("loss_mask", "qa")


def _vocabulary_path(values: dict[str, Any]) -> str:
    """The ``vocab.json`` of the base, of an earlier run, or else of the run to come."""
    base, project = values.get("load_model", ""), Path(values.get("proj_dir", "out"))
    folders = [Path(base).parent, project] if base else [project]
    there = (folder / _VOCABULARY for folder in folders if (folder / _VOCABULARY).is_file())
    return str(next(there, project / _VOCABULARY))


def check_sources(data: DataConfig, kinds: Collection[str], findings: Findings) -> None:
    """Note every setting that the kinds of the data do not honour.

    Args:
        kinds: the formats of the parts of ``--data_file``.
    """
    if "sft" not in kinds:
        for name in ("sft_field", "sft_split"):
            findings.check(
                getattr(data, name) == getattr(DataConfig, name, []),
                f"--{name} has no effect without --data_type sft",
                found=f"--data_type {data.data_type}",
                fix="--data_type sft",
            )
    findings.check(
        len(data.sft_field) <= 2,
        "--sft_field takes the columns of prompt and answer, or that of the text",
        found=" ".join(data.sft_field),
    )
    findings.check(
        not data.my_sample_len or (data.my_sample_len > 1 and "uint16" in kinds),
        "--my_sample_len is the length of the documents of --data_type uint16",
        found=f"--my_sample_len {data.my_sample_len} --data_type {data.data_type}",
        expected="2 or more tokens",
        fix="leave it out",
    )
    texts = sorted(set(kinds) & set(TEXTS))
    if texts:
        _check_text(data, texts[0], findings)


def _check_text(data: DataConfig, kind: str, findings: Findings) -> None:
    findings.check(
        data.dataload == "get",
        f"--data_type {kind} is one text, of which --dataload {data.dataload} would read the beginning alone",
        fix="--dataload get",
    )
    findings.check(
        data.loss_mask in ("none", "pad"),
        f"--loss_mask {data.loss_mask} needs documents, and --data_type {kind} is one text",
        fix="a jsonl file, or --loss_mask none",
    )
    findings.check(not data.mask_think, f"--mask_think needs documents, and --data_type {kind} is one text",
                   fix="a jsonl file")
    findings.check(
        kind != "dummy" or data.data_file == _DUMMY,
        "--data_type dummy makes its own data and reads no file",
        found=f"--data_file {data.data_file}",
        fix="leave --data_file out",
    )


def check_source_file(path: str, kind: str, findings: Findings) -> None:
    """Note if the file of one part is not there, or a package that reads it is not installed.

    Args:
        kind: any but binidx and jsonl.
    """
    if kind == "dummy":
        return
    if kind == "sft":
        _check_table(path, findings)
        return
    findings.check(Path(path).is_file(), "--data_file names a file that does not exist", found=path,
                   fix="check the path")


def _check_table(path: str, findings: Findings) -> None:
    suffix = Path(path).suffix.lower()
    is_file = suffix in TABLES and not Path(path).is_dir()
    findings.check(not is_file or Path(path).is_file(), "--data_file names a file that does not exist", found=path,
                   fix="check the path")
    package = {".parquet": "pyarrow"}.get(suffix) if is_file else "datasets"
    if package is not None:
        findings.check(find_spec(package) is not None, f"{path} needs the package {package}, which is not installed",
                       fix=_FIX_INSTALL)


def check_vocabulary(data: DataConfig, load_model: str, findings: Findings) -> None:
    """Note if a text is to go on training a model whose character vocabulary is not there."""
    if load_model and data.data_type in ("utf-8", "utf-16le") and data.tokenizer.lower().endswith(".json"):
        findings.check(
            Path(data.tokenizer).is_file(),
            f"the vocabulary that {load_model} was trained with is not there",
            found=f"no {data.tokenizer}",
            expected="its vocab.json beside the model or in --proj_dir",
            fix="--tokenizer FILE with the vocab.json or, for a model of another kind, --tokenizer world",
        )
