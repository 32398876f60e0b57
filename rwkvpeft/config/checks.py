"""Which settings go together, and which files must be there before anything heavy begins."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rwkvpeft.config.check_chat import check_chat
from rwkvpeft.config.check_evaluation import check_evaluation, check_evaluation_files
from rwkvpeft.config.check_long_context import check_long_context
from rwkvpeft.config.check_objective import check_objective, check_objective_files
from rwkvpeft.config.check_pretraining import check_pretraining
from rwkvpeft.config.check_regularisers import check_regularisers
from rwkvpeft.config.check_rows import check_rows
from rwkvpeft.config.check_sources import check_vocabulary
from rwkvpeft.config.check_strategy import check_strategy
from rwkvpeft.config.data_files import check_data_files
from rwkvpeft.config.findings import Findings, nearest
from rwkvpeft.config.groups import DataConfig, MethodConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from rwkvpeft.config.layer_profile import read_layer_profile
from rwkvpeft.config.methods import check_method, members
from rwkvpeft.config.splitting_batches import check_halving, check_splitting
from rwkvpeft.errors import UserError

_AT_LEAST: dict[str, dict[str, float]] = {
    "data": {"ctx_len": 1, "num_workers": 0, "preview": 0, "magic_prime": 0},
    "schedule": {
        "epoch_steps": 0,
        "epoch_count": 1,
        "epoch_begin": 0,
        "micro_bsz": 1,
        "accumulate_grad_batches": 1,
        "lr_final": 0,
        "warmup_steps": -1,
    },
    "optimizer": {"weight_decay": 0, "grad_clip": 0, "logit_penalty": 0},
    "runtime": {"devices": 1, "num_nodes": 1},
    "output": {"epoch_save": 0, "save_steps": 0, "step_save": 0, "keep": 0},
    "faults": {"peer_timeout": 5, "skip_broken": 0, "spike": 0, "read_timeout": 0},
}

_FOUR_BIT = ("nf4", "fp4", "4bit")


def check_values(config: TrainConfig, findings: Findings, *, planned: bool = False) -> None:
    """Note every value out of its range and every pair of settings that exclude each other.

    Args:
        planned: the run needs neither a base model nor data yet.
    """
    if not planned:
        _check_there(config, findings)
    for group, limits in _AT_LEAST.items():
        for name, least in limits.items():
            value = getattr(getattr(config, group), name)
            if value is not None and value < least:
                findings.add(f"--{name} is too small", found=value, expected=f"{least:g} or more")
    _check_model(config.model, findings)
    _check_data(config.data, config.schedule, findings)
    _check_rates(config.schedule, config.optimizer, findings)
    _check_method(config, findings)
    check_pretraining(config, findings, planned=planned)
    check_regularisers(config, findings)
    check_evaluation(config, findings)
    check_long_context(config, findings)
    check_objective(config, findings)
    check_strategy(config, findings)
    check_rows(config.data, findings)
    check_splitting(config, findings)
    check_halving(config, findings)
    check_chat(config.data, findings)


def _check_there(config: TrainConfig, findings: Findings) -> None:
    findings.check(
        # initial weights need none
        bool(config.data.data_file) or config.schedule.train_stage == 1,
        "no training data is given",
        fix="--data_file PREFIX-of-.bin-and-.idx or FILE.jsonl",
    )


def _check_model(model: ModelConfig, findings: Findings) -> None:
    for name in ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "head_size_a"):
        value = getattr(model, name)
        findings.check(value is None or value > 0, f"--{name} is too small", found=value, expected="1 or more")
    findings.check(model.head_size_divisor > 0, "--head_size_divisor must be above 0", found=model.head_size_divisor)


def _check_data(data: DataConfig, schedule: ScheduleConfig, findings: Findings) -> None:
    if data.dataload == "only":
        findings.check(
            schedule.micro_bsz == 1,
            "--dataload only needs --micro_bsz 1: its rows differ in length",
            found=schedule.micro_bsz,
            fix="--micro_bsz 1, with --accumulate_grad_batches for larger steps",
        )
    if data.magic_prime:
        findings.check(
            data.dataload == "get",
            "--magic_prime has no effect without --dataload get",
            found=f"--dataload {data.dataload}",
        )
    if data.loss_mask == "se":
        markers = [data.mask_id.get(name) for name in ("mask0", "mask1")]
        findings.check(
            all(isinstance(marker, str) and marker for marker in markers),
            "--loss_mask se needs two marker texts",
            found=data.mask_id,
            expected='{"mask0": "start", "mask1": "end"}',
        )
    unread = sorted(set(data.mask_id) - {"mask0", "mask1"})
    findings.check(not unread, "--mask_id has unknown keys", found=unread, expected=["mask0", "mask1"])
    if data.num_workers == 0:
        for name in ("persistent_workers", "prefetch_factor"):
            findings.check(
                not getattr(data, name), f"--{name} has no effect without data workers", fix=f"--num_workers 2 --{name}"
            )


def _check_rates(schedule: ScheduleConfig, optimizer: OptimizerConfig, findings: Findings) -> None:
    findings.check((schedule.lr_init or 0) > 0, "--lr_init must be above 0", found=schedule.lr_init)
    if schedule.lr_schedule == "exp":
        findings.check(
            (schedule.lr_final or 0) > 0, "--lr_schedule exp needs --lr_final above 0", found=schedule.lr_final
        )
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        findings.check(0 <= value < 1, f"--{name} is out of range", found=value, expected="0 up to below 1")
    findings.check(optimizer.adam_eps > 0, "--adam_eps must be above 0", found=optimizer.adam_eps)
    final = optimizer.weight_decay_final
    findings.check(
        final == -1 or final >= 0, "--weight_decay_final is out of range", found=final, expected="-1, or 0 and more"
    )


def _check_method(config: TrainConfig, findings: Findings) -> None:
    method = config.method
    check_method(method.peft, findings)
    if method.layer_profile:
        _check_profile(method, findings)
    elif method.peft == "none":
        _check_full_training(method, findings)
    elif method.peft == "state":
        _check_parts("--peft state, which leaves the base as it is", method, findings)
    _check_quantisation(method, findings)
    if method.adapter_init:
        findings.check(bool(method.adapter), "--adapter_init has no effect without --adapter", fix="--adapter FILE")
        findings.check(
            "pissa" in members(method.peft) or bool(method.layer_profile),
            f"--adapter_init has no effect with --peft {method.peft}: only PiSSA has start values",
            found=method.adapter_init,
            fix="--peft pissa",
        )


def _check_profile(method: MethodConfig, findings: Findings) -> None:
    findings.check(
        method.peft in ("none", "state"),
        "--layer_profile names the method of each layer; --peft can only add the states",
        found=f"--peft {method.peft}",
        fix="leave --peft out, or --peft state",
    )
    findings.check(
        not method.peft_config,
        "--layer_profile holds the settings of each layer, so --peft_config has no effect",
        found=json.dumps(method.peft_config),
        fix="write them into the profile",
    )


def _check_full_training(method: MethodConfig, findings: Findings) -> None:
    findings.check(not method.peft_config, "--peft_config has no effect without --peft", fix="--peft lora")
    findings.check(
        not method.adapter, "--adapter has no effect without --peft", found=method.adapter, fix="--peft lora"
    )
    _check_parts("--peft none, which trains every part", method, findings)
    findings.check(
        method.quant == "none",
        f"--quant {method.quant} needs --peft: only frozen weights can be quantised, and --peft none trains them all",
        fix=f"--peft lora --quant {method.quant}",
    )


def _check_parts(reason: str, method: MethodConfig, findings: Findings) -> None:
    findings.check(
        set(method.train_parts) <= {"time", "ln"},
        f"--train_parts has no effect with {reason}",
        found=method.train_parts,
        fix="--peft lora",
    )


def _check_quantisation(method: MethodConfig, findings: Findings) -> None:
    if method.quant_double:
        findings.check(
            method.quant in _FOUR_BIT,
            "--quant_double stores the scales of 4-bit formats in 8 bits",
            found=f"--quant {method.quant}",
            expected=[f"--quant {name}" for name in _FOUR_BIT],
            fix="--quant nf4 --quant_double",
        )
    if method.quant_head:
        findings.check(method.quant != "none", "--quant_head has no effect without --quant", fix="--quant nf4")
        findings.check(
            "head" not in method.train_parts,
            "--quant_head needs a frozen head, and --train_parts trains it",
            found=method.train_parts,
            fix="leave one of the two out",
        )


def check_paths(config: TrainConfig, findings: Findings) -> None:
    """Note every input file that is not there and an output folder that cannot be written. Writes nothing."""
    if config.model.load_model:
        _check_file("--load_model", config.model.load_model, findings)
    # a folder of Hugging Face peft is as good as a file
    if config.method.adapter and not (Path(config.method.adapter) / "adapter_config.json").is_file():
        _check_file("--adapter", config.method.adapter, findings)
    if config.method.layer_profile:
        try:
            read_layer_profile(config.method.layer_profile)
        except UserError as error:
            findings.errors.append(error)
    if config.method.adapter_init:
        _check_file("--adapter_init", config.method.adapter_init, findings)
    if config.data.data_file:
        check_data_files(config.data, findings)
        check_vocabulary(config.data, config.model.load_model, findings)
    check_evaluation_files(config, findings)
    check_objective_files(config, findings)
    if config.output.resume not in ("auto", "none") and not Path(config.output.resume).is_dir():
        findings.add("--resume names no folder", found=config.output.resume, expected="auto, none, or a resume folder")
    check_folder("--proj_dir", Path(config.output.proj_dir), findings)


def _check_file(option: str, name: str, findings: Findings) -> None:
    path = Path(name)
    if path.is_file():
        return
    if path.is_dir():
        findings.add(f"{option} names a folder, not a file", found=name, fix="name a file in it")
        return
    folder = path.parent
    files = (item for item in folder.glob(f"*{path.suffix}") if item.is_file()) if folder.is_dir() else ()
    there = sorted(item.name for item in files)
    near = nearest(path.name, there)
    fix = (
        f"{option} {folder / near}" if near else "check the path" if folder.is_dir() else f"there is no folder {folder}"
    )
    findings.add(f"{option} names a file that does not exist", found=name, fix=fix)


def check_folder(option: str, folder: Path, findings: Findings) -> None:
    """Note if ``folder`` is not, or cannot become, a folder to write into."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        findings.add(f"{option} cannot be a folder: {existing} is a file", found=str(folder))
    elif not os.access(existing, os.W_OK | os.X_OK):
        findings.add(f"{option} cannot be written", found=str(folder), fix="choose a folder of your own")
