"""``python -m rwkvpeft.evaluate --tasks``: a model in lm_eval, EleutherAI's evaluation harness."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvpeft.config.findings import nearest
from rwkvpeft.errors import UserError

if TYPE_CHECKING:
    from rwkvpeft.generation.tuned import TunedModel

_LARGEST_SHOWN = 300
_TOKENS_AT_ONCE = 8192


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``evaluate_tasks`` reads."""
    group = parser.add_argument_group("tasks", "of lm_eval (pip install '.[eval]'), instead of data")
    group.add_argument("--tasks", metavar="NAMES", help="tasks or groups, with commas between: lambada_openai,piqa")
    group.add_argument("--num_fewshot", type=int, metavar="N", help="solved examples before each question (default: "
                       "the task's)")
    group.add_argument("--limit", type=float, metavar="N", help="questions of each task at most; below 1: that share")
    group.add_argument("--task_folder", metavar="DIR", help="folder with tasks of your own, in lm_eval's YAML")
    group.add_argument("--chat_layout", action="store_true", help="ask in turns, User: and Assistant:")
    group.add_argument("--tokens_at_once", type=int, default=_TOKENS_AT_ONCE, metavar="N",
                       help="tokens computed at once (default: %(default)s)")


def refuse_task_flags(flags: argparse.Namespace) -> None:
    """Raises: UserError naming the flags that ask for something of ``--tasks``, which is not given."""
    given = [f"--{name}" for name in ("num_fewshot", "limit", "task_folder") if getattr(flags, name) is not None]
    given += ["--chat_layout"] if flags.chat_layout else []
    given += ["--tokens_at_once"] if flags.tokens_at_once != _TOKENS_AT_ONCE else []
    if given:
        raise UserError("these flags have no effect without --tasks", found=", ".join(given), fix="leave them out")


def check_tasks(flags: argparse.Namespace) -> None:
    """Raises: UserError for what can be told without the package or the model."""
    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs the package lm_eval, which is not installed", fix="pip install '.[eval]'")
    if flags.task_folder and not Path(flags.task_folder).is_dir():
        raise UserError("--task_folder names no folder", found=flags.task_folder, fix="check the path")
    if flags.num_fewshot is not None and flags.num_fewshot < 0:
        raise UserError("--num_fewshot is out of range", found=flags.num_fewshot, expected="0 or more")
    if flags.limit is not None and flags.limit <= 0:
        raise UserError("--limit is out of range", found=flags.limit, expected="above 0")
    if flags.tokens_at_once < 1:
        raise UserError("--tokens_at_once is out of range", found=flags.tokens_at_once, expected="1 or more")
    flags.task_manager = _find_tasks(_names(flags), flags.task_folder)


def _names(flags: argparse.Namespace) -> list[str]:
    return [name.strip() for name in flags.tasks.split(",") if name.strip()]


def _find_tasks(names: list[str], folder: str | None) -> Any:
    """What knows all the tasks. Raises: UserError naming one that nobody knows."""
    from lm_eval.tasks import TaskManager

    if folder:
        # lm_eval's own are so many that listing them takes seconds
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    known = TaskManager(include_path=folder)
    for name in names:
        if name not in known.all_tasks and not known.match_tasks([name]):
            near = nearest(name, known.all_tasks)
            raise UserError(f"lm_eval has no task {name}", fix=f"--tasks {near}" if near else "lm-eval ls tasks")
    return known


def evaluate_tasks(flags: argparse.Namespace, tuned: TunedModel) -> dict[str, Any]:
    """Run the tasks. Returns: under ``tasks`` the metrics of each task and group by name.

    Raises: UserError if the data of a task cannot be had.
    """
    from lm_eval import simple_evaluate

    from rwkvpeft.generation.harness import RwkvLm

    model = RwkvLm(tuned, tokens_at_once=flags.tokens_at_once)
    try:
        found = simple_evaluate(
            model=model,
            tasks=flags.task_manager.match_tasks(_names(flags)),
            num_fewshot=flags.num_fewshot,
            limit=int(flags.limit) if flags.limit and flags.limit >= 1 else flags.limit,
            task_manager=flags.task_manager,
            apply_chat_template=flags.chat_layout,
            log_samples=False,
        )
    except OSError as reason:
        raise UserError(
            "the data of a task cannot be had",
            found=" ".join(str(reason).split())[:_LARGEST_SHOWN],
            fix="check the network; lm_eval fetches its tasks' data from huggingface.co",
        ) from reason
    results = {**found["results"], **(found.get("groups") or {})}
    return {"tasks": {name: _figures(metrics) for name, metrics in results.items()}}


def _figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """A task's metrics without names and filters: ``acc,none`` becomes ``acc``."""
    return {name.removesuffix(",none"): value for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)}


def task_lines(found: dict[str, Any]) -> list[str]:
    """The results for people, a line for each metric."""
    lines = []
    for task, figures in found["tasks"].items():
        for name, value in figures.items():
            # how many questions were asked is no result
            if "_stderr" in name or name == "sample_len":
                continue
            metric, _, filtered = name.partition(",")
            spread = figures.get(f"{metric}_stderr,{filtered}" if filtered else f"{metric}_stderr")
            lines.append(f"{task}  {name} {value:.4f}" + (f" ± {spread:.4f}" if spread is not None else ""))
    return lines
