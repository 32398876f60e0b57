"""From what was given to all of a run's settings: defaults by method and machine, then the checks of values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rwkvpeft.config.check_long_context import long_context_remarks
from rwkvpeft.config.check_sources import by_source
from rwkvpeft.config.checks import check_paths, check_values
from rwkvpeft.config.data_files import is_jsonl, without_suffix
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.methods import members
from rwkvpeft.config.objective import PREFERENCES
from rwkvpeft.config.parse import build_groups
from rwkvpeft.config.pretraining import by_stage

_METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    # a state starts at zero and has few parameters: upstream's scripts train it with a rate of 1
    "state": {"lr_init": 1.0, "lr_final": 0.01, "warmup_steps": 10, "ctx_len": 512},
}
_DEFAULTS: dict[str, Any] = {"lr_init": 6e-4, "lr_final": 1e-5, "warmup_steps": -1, "ctx_len": 1024}
# what is compared moves far with small steps: the rates that the papers and TRL train adapters with
_OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    **{name: {"lr_init": 5e-5, "lr_final": 5e-6} for name in PREFERENCES},
    "grpo": {"lr_init": 1e-5, "lr_final": 1e-6},
}
_LOWEST_STATE_LR = 0.1
_READ_FROM_FILE = ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "head_size_a")


@dataclass(frozen=True)
class Machine:
    """What decides defaults: the kind of device the run will use, and whether it computes in bf16."""

    device_type: str
    has_bf16: bool


def resolve(
    given: Mapping[str, Any],
    machine: Machine,
    *,
    earlier_seed: int | None = None,
    files_too: bool = False,
    planned: bool = False,
) -> tuple[TrainConfig, list[str]]:
    """Fill in what was not given and check that the settings go together.

    Args:
        given: values by field name.
        earlier_seed: seed of the run that may be taken up again; stands in for a seed that is not given. -1: another
            process draws it.
        files_too: also check that the files are there and that the output folder can be written.
        planned: the run is only talked about and needs neither a base model nor data yet.
    Returns: all settings, none of them left open except sizes the checkpoint tells; and remarks, one line each.
    Raises: UserError listing every mistake found.
    """
    values = dict(given)
    remarks: list[str] = []
    for name in _READ_FROM_FILE:
        # upstream's way to say "not told"
        if values.get(name) == 0:
            values[name] = None
    _by_method(values)
    _by_data(values)
    by_stage(values)
    _by_machine(values, machine, remarks)
    findings = Findings()
    _seed(values, earlier_seed, remarks)
    config = build_groups(values)
    check_values(config, findings, planned=planned)
    if files_too:
        check_paths(config, findings)
    findings.raise_any()
    remarks += long_context_remarks(config)
    alone = config.method.peft == "state" and not config.method.layer_profile
    if alone and (config.schedule.lr_init or 0.0) < _LOWEST_STATE_LR:
        remarks.append(
            f"warning: --lr_init {config.schedule.lr_init:g} is small for state tuning, which needs about 1 "
            "(--lr_init 1 --lr_final 0.01)"
        )
    return config, remarks


def _by_method(values: dict[str, Any]) -> None:
    # beside a layer profile --peft only adds the states, which have their own rates there
    method = "none" if values.get("layer_profile") else values.get("peft", "none")
    objective = values.get("objective", "")
    by_choice = {**_DEFAULTS, **_OBJECTIVE_DEFAULTS.get(objective, {}), **_METHOD_DEFAULTS.get(method, {})}
    for name, default in by_choice.items():
        if values.get(name) is None:
            values[name] = default


def _by_data(values: dict[str, Any]) -> None:
    data_file = str(values.get("data_file", ""))
    if "data_type" not in values and data_file and is_jsonl(data_file):
        values["data_type"] = "jsonl"
    if values.get("data_type", "binidx") == "binidx" and data_file:
        values["data_file"] = without_suffix(data_file)
    by_source(values)
    if values.get("dataload") == "only":
        values.setdefault("micro_bsz", 1)


def _by_machine(values: dict[str, Any], machine: Machine, remarks: list[str]) -> None:
    if values.get("accelerator", "auto") == "auto":
        values["accelerator"] = "cpu" if machine.device_type == "cpu" else "gpu"
    if values.get("precision") is None:
        values["precision"] = "bf16" if values["accelerator"] == "gpu" and machine.has_bf16 else "fp32"
    if values.get("op") == "fla" and "state" in members(values.get("peft", "none")):
        # upstream's state tuning runs on nothing else, so its scripts all say it: a habit, not a choice
        values.update(op="auto", fla=True)
        remarks.append("--op fla is taken as --fla: upstream's scripts for state tuning always carry it")


def _seed(values: dict[str, Any], earlier_seed: int | None, remarks: list[str]) -> None:
    if values.get("random_seed", -1) >= 0:
        return
    if earlier_seed is not None:
        values["random_seed"] = earlier_seed
        return
    values["random_seed"] = random.SystemRandom().randrange(2**31)
    remarks.append(
        f"random seed {values['random_seed']} (give --random_seed {values['random_seed']} to repeat this run)"
    )
