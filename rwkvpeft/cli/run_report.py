"""``report.md``: what a run did, in one page with pictures, made from the files it left in ``proj_dir``."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvpeft.atomic import NotWrittenError, write_whole
from rwkvpeft.config.flags import specs
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.training.callbacks.lines import read_records
from rwkvpeft.training.callbacks.watching import SAMPLES, VAL_DATA
from rwkvpeft.training.fault_log import FAULTS
from rwkvpeft.training.step_record import SHOWN_FIGURES
from rwkvpeft.training.suspects import shortened

if TYPE_CHECKING:
    from rwkvpeft.training.fit import FitResult

_PACKAGES = ("rwkvpeft", "torch", "pytorch-lightning", "numpy", "triton", "bitsandbytes", "peft", "fla-core")
_MOST_ROWS = 24
_GIB = 2**30
_NO_PICTURES = "Pictures of the curves need matplotlib: `pip install 'rwkvpeft[plot]'`."


def report_line(config: TrainConfig, result: FitResult, *, beginning: list[str], ending: list[str]) -> str:
    """Write ``report.md`` and say where it is, or why it is not: a run that has saved its model has not failed."""
    try:
        return f"report    {write_report(config, result, beginning=beginning, ending=ending)}"
    except NotWrittenError as reason:
        return f"report    {reason.what}: {reason.found}"


def write_report(
    config: TrainConfig, result: FitResult, *, beginning: Sequence[str], ending: Sequence[str]
) -> Path:
    """Write ``report.md`` and its pictures, each whole or not at all; ``report.md`` comes last.

    Args:
        beginning: what the run said before its first step.
        ending: what it said after its last.
    Returns: the path of ``report.md``.
    Raises: UserError if a file cannot be written.
    """
    folder = Path(config.output.proj_dir)
    steps = read_records(folder / "loss_data.jsonl")
    evaluations = read_records(folder / VAL_DATA)
    pictures: list[str] = []
    if steps and find_spec("matplotlib") is not None:
        # a second to import, and not there everywhere
        from rwkvpeft.cli.run_pictures import draw_run

        pictures = [f"![{name}](report/{name}.png)" for name in draw_run(steps, evaluations, folder / "report")]
    parts = [
        [f"# {folder.resolve().name}", "", _outcome(result)],
        ["## What it came to", "", *_as_text(ending)],
        ["## How it went", "", *_course(steps), "", *(pictures or [_NO_PICTURES])],
        _faults(read_records(folder / FAULTS)),
        _evaluations(evaluations, config),
        _answers(read_records(folder / SAMPLES), result),
        ["## What was trained on what", "", *_as_text(beginning)],
        ["## Settings", "", *_settings(config)],
        ["## Versions", "", *_table(("", "version"), _versions())],
    ]
    text = "\n\n".join("\n".join(part) for part in parts if part) + "\n"
    path = folder / "report.md"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def _outcome(result: FitResult) -> str:
    if result.stopped_early:
        return f"Interrupted after step {result.steps}; the same command goes on from there."
    if result.gave_up:
        return f"Ended after step {result.steps}, as the held-out loss no longer fell."
    return f"Complete after step {result.steps}."


def _course(steps: list[dict[str, Any]]) -> list[str]:
    if not steps:
        return ["No step was taken."]
    # a step that was left out has none
    losses = [step["loss"] for step in steps if step["loss"] is not None] or [math.nan]
    seconds = sum(step["t_cost"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    rows = [
        ("optimizer steps", f"{len(steps):,}"),
        ("loss of the first and the last step", f"{losses[0]:.4f}, {losses[-1]:.4f}"),
        ("tokens read, padding included", f"{tokens:,}"),
        ("time in steps", str(timedelta(seconds=round(seconds)))),
        ("tokens/s, mean", f"{tokens / max(seconds, 1e-9):,.0f}"),
    ]
    memory = [step["memory"] for step in steps if step.get("memory")]
    if memory:
        rows.append(("most memory of a process", f"{max(memory) / _GIB:.2f} GiB"))
    return _table(("", ""), rows)


def _faults(faults: list[dict[str, Any]]) -> list[str]:
    """The first steps that were left out or stood out."""
    if not faults:
        return []
    rows = [
        (str(fault["step"]), fault["kind"], _number(fault["loss"]), shortened(fault["documents"]))
        for fault in faults[:_MOST_ROWS]
    ]
    lines = ["## Faults", "", *_table(("step", "what", "loss", "it held"), rows)]
    return [*lines, "", f"All {len(faults)} are in `{FAULTS}`, with every document."]


def _evaluations(evaluations: list[dict[str, Any]], config: TrainConfig) -> list[str]:
    if not evaluations:
        return []
    width = -(-len(evaluations) // _MOST_ROWS)
    shown = [
        line
        for number, line in enumerate(evaluations)
        if number % width == 0 or line["best"] or number == len(evaluations) - 1
    ]
    best = max((line["step"] for line in evaluations if line["best"]), default=None)
    rows = [
        (
            f"{line['step'] or 'base'}{' (best)' if line['step'] == best else ''}",
            _number(line["val_loss"]),
            _number(line["perplexity"], 2),
            _number(line["general_loss"]),
            *(_number(line.get("metrics", {}).get(name)) for name in SHOWN_FIGURES),
        )
        for line in shown
    ]
    names = ("step", "held-out loss", "perplexity", "general loss", *SHOWN_FIGURES)
    kept = [column for column in range(len(names)) if any(row[column] for row in rows)]
    lines = ["## Evaluations", "", *_table([names[i] for i in kept], [[row[i] for i in kept] for row in rows])]
    if width > 1:
        lines += ["", f"All {len(evaluations)} are in `{VAL_DATA}`."]
    base, last = evaluations[0]["general_loss"], evaluations[-1]["general_loss"]
    if evaluations[0]["step"] == 0 and base is not None and last is not None:
        alarm = config.evaluation.general_alarm
        verdict = "above" if last - base > alarm else "within"
        lines += ["", f"Forgetting: the general loss moved by {last - base:+.4f} nats, {verdict} the {alarm:g} of "
                  "`--general_alarm`."]
    return lines


def _answers(samples: list[dict[str, Any]], result: FitResult) -> list[str]:
    """The base's answers beside the last ones."""
    last = max((sample["step"] for sample in samples), default=0)
    if not last:
        return []
    before = [sample for sample in samples if sample["step"] == 0]
    after = [sample for sample in samples if sample["step"] == last]
    lines = ["## Answers", "", "Greedy, the untouched base beside the model after "
             f"{'the last step' if last == result.steps else f'step {last}'}."]
    for number, sample in enumerate(after):
        rows = [(f"step {last}", sample["answer"])]
        if number < len(before):
            rows.insert(0, ("base", before[number]["answer"]))
        if sample.get("expected"):
            rows.append(("expected", sample["expected"]))
        lines += ["", *_table(("asked", sample["prompt"]), rows)]
    return lines


def _settings(config: TrainConfig) -> list[str]:
    changed, others = [], []
    for group in fields(config):
        values = getattr(config, group.name)
        for spec in specs(type(values)):
            value = getattr(values, spec.name)
            row = (f"`{spec.option}`", _shown(value))
            if value == spec.default:
                others.append(row)
            else:
                changed.append((*row, _shown(spec.default)))
    return [
        "Other than the defaults, or chosen by the tool; `config.yaml` repeats the run:",
        "",
        *_table(("flag", "value", "default"), changed),
        "",
        "<details><summary>At their defaults</summary>",
        "",
        *_table(("flag", "value"), others),
        "",
        "</details>",
    ]


def _versions() -> list[tuple[str, str]]:
    rows = [("Python", platform.python_version()), ("system", platform.platform())]
    for name in _PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), "|" + " --- |" * len(head), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text that cannot break out of its cell."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return plain.replace("\r", "").replace("\n", "<br>")


def _as_text(lines: Sequence[str]) -> list[str]:
    """Lines as they stood on the screen."""
    return [f"    {line}" for line in lines]


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
