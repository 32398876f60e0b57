"""What a run is watched by: which settings go together, and how files beside ``--data_file`` are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rwkvpeft.config.check_sources import TABLES, TEXTS
from rwkvpeft.config.data_files import check_data_files, data_files, format_of, without_suffix
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig, EvaluationConfig, TrainConfig
from rwkvpeft.errors import UserError

_AT_LEAST = {"val_split": 0, "val_steps": 0, "early_stop": 0, "general_alarm": 0, "sample_tokens": 1}


def check_evaluation(config: TrainConfig, findings: Findings) -> None:
    """Note every such value out of its range or without effect."""
    evaluation = config.evaluation
    for name, least in _AT_LEAST.items():
        value = getattr(evaluation, name)
        findings.check(value >= least, f"--{name} is too small", found=value, expected=f"{least} or more")
    split = evaluation.val_split
    findings.check(
        split <= 1 or split == int(split),
        "--val_split from 1 on is a number of documents",
        found=f"{split:g}",
        fix=f"--val_split {round(split)}",
    )
    findings.check(
        not (split and evaluation.val_data_file),
        "--val_split and --val_data_file both say what is held out",
        fix="leave one of the two out",
    )
    held_out = bool(evaluation.val_data_file or split)
    _check_effects(evaluation, held_out, findings)
    _check_vocabulary(config.data, evaluation, findings)


def _check_effects(evaluation: EvaluationConfig, held_out: bool, findings: Findings) -> None:
    findings.check(
        held_out or not evaluation.early_stop,
        "--early_stop needs held-out data to go by",
        found=f"--early_stop {evaluation.early_stop}",
        fix="--val_split 0.1, or --val_data_file FILE",
    )
    findings.check(
        held_out or bool(evaluation.general_data_file or evaluation.sample_prompts) or not evaluation.val_steps,
        "--val_steps has nothing to evaluate",
        found=f"--val_steps {evaluation.val_steps}",
        fix="--val_split 0.1, or --val_data_file FILE",
    )
    findings.check(
        bool(evaluation.general_data_file) or evaluation.general_alarm == EvaluationConfig.general_alarm,
        "--general_alarm has no effect without --general_data_file",
        found=f"--general_alarm {evaluation.general_alarm:g}",
        fix="--general_data_file FILE",
    )
    findings.check(
        bool(evaluation.sample_prompts or (held_out and evaluation.report))
        or evaluation.sample_tokens <= 0
        or evaluation.sample_tokens == EvaluationConfig.sample_tokens,
        "--sample_tokens has nothing to answer",
        found=f"--sample_tokens {evaluation.sample_tokens}",
        fix="--sample_prompts FILE",
    )


def _check_vocabulary(data: DataConfig, evaluation: EvaluationConfig, findings: Findings) -> None:
    made = data.data_type in TEXTS and data.tokenizer.endswith(".json") and not Path(data.tokenizer).exists()
    for name in ("val_data_file", "general_data_file"):
        findings.check(
            not (made and getattr(evaluation, name)),
            f"--{name} may hold characters that the vocabulary made of --data_file lacks",
            found=f"{data.tokenizer} is not there yet",
            fix="--tokenizer with a vocabulary that is there",
        )


def check_evaluation_files(config: TrainConfig, findings: Findings) -> None:
    """Note every file that is not there, and what is held out but trained on."""
    evaluation = config.evaluation
    for name, read_as in (("val_data_file", other_data), ("general_data_file", general_data)):
        if value := getattr(evaluation, name):
            found = Findings()
            try:
                check_data_files(read_as(config.data, value), found)
            except UserError as reason:
                found.errors.append(reason)
            for error in found.errors:
                what, fix = (str(text).replace("--data_file", f"--{name}") for text in (error.what, error.fix))
                # the checks know --data_file alone: what they say of its settings is said of this file
                what = what if f"--{name}" in what else f"--{name} {value}: {what}"
                findings.add(what, found=error.found, expected=error.expected, fix=fix if error.fix else None)
    if evaluation.val_data_file and not findings.errors:
        both = _paths(config.data.data_file) & _paths(evaluation.val_data_file)
        findings.check(
            not both,
            "--val_data_file holds out what --data_file trains on",
            found=", ".join(sorted(both)),
            fix="--val_split 0.05 holds out a part of it",
        )
    if evaluation.sample_prompts:
        findings.check(
            Path(evaluation.sample_prompts).is_file(),
            "--sample_prompts names a file that does not exist",
            found=evaluation.sample_prompts,
            fix="check the path",
        )


def _paths(data_file: str) -> set[str]:
    return {str(Path(part.path)) for part in data_files(without_suffix(data_file))} if data_file else set()


def other_data(data: DataConfig, path: str) -> DataConfig:
    """The settings that read ``path`` as the training data are read, in its own format where its name tells one.

    Raises: UserError as ``data_files`` does.
    """
    kind = _kind_of(data, path)
    takes_columns = any(format_of(part.path, kind) == "sft" for part in data_files(path))
    return replace(
        data,
        data_file=without_suffix(path) if kind == "binidx" else path,
        data_type=kind,
        magic_prime=0,
        sft_field=data.sft_field if takes_columns else [],
        # a file has one split, of which the training data may be some rows
        sft_split=data.sft_split if takes_columns and _suffix(path) not in TABLES else "train",
        my_sample_len=data.my_sample_len if kind == "uint16" else 0,
    )


def _kind_of(data: DataConfig, path: str) -> str:
    suffix = _suffix(path)
    if suffix == ".jsonl":
        return data.data_type if data.data_type == "sft" else "jsonl"
    if suffix == ".txt":
        return data.data_type if data.data_type == "utf-16le" else "utf-8"
    return "binidx" if Path(f"{without_suffix(path)}.bin").is_file() else data.data_type


def _suffix(path: str) -> str:
    return Path(data_files(path)[0].path).suffix.lower()


def general_data(data: DataConfig, path: str) -> DataConfig:
    """The settings that read ``path`` as a stream of text all of which counts. Raises: UserError as ``other_data``."""
    if _suffix(path) == ".jsonl":
        # of another kind, so without the columns of the training data
        data = replace(data, data_type="jsonl")
    return replace(other_data(data, path), dataload="get", loss_mask="none", mask_think=False, length_buckets=False)
