"""Whether an objective goes together with the other settings of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkvpeft.config.data_files import data_files, format_of
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig, TrainConfig
from rwkvpeft.config.objective import (
    PREFERENCES,
    WITH_REFERENCE,
    DistillationConfig,
    ObjectiveConfig,
    RewardConfig,
)
from rwkvpeft.config.reference import SPLITS_WEIGHTS
from rwkvpeft.errors import UserError

# which objectives read which settings; the others' must be left alone
_READ_BY: dict[str, tuple[str, ...]] = {
    "beta": PREFERENCES,
    "sft_share": PREFERENCES,
    "flip_share": ("dpo", "wpo", "cpo", "simpo"),
    "length_norm": PREFERENCES,
    "simpo_gamma": ("simpo",),
    "dpo_loss": ("dpo", "cpo", "simpo"),
    "kto_desirable": ("kto",),
    "kto_undesirable": ("kto",),
    "reference": WITH_REFERENCE,
}


def check_objective(config: TrainConfig, findings: Findings) -> None:
    """Note every setting that the objective does not read, or cannot honour."""
    name = config.objective.objective
    _check_unread(config, findings)
    if name in PREFERENCES:
        _check_preferences(config, findings)
    elif name == "distill":
        _check_distillation(config, findings)
    elif name == "grpo":
        _check_rewards(config, findings)
    if config.objective.reads != "tokens":
        _check_rows(config, findings)


def _check_unread(config: TrainConfig, findings: Findings) -> None:
    name = config.objective.objective
    for field, objectives in _READ_BY.items():
        value = getattr(config.objective, field)
        findings.check(
            name in objectives or value == getattr(ObjectiveConfig(), field),
            f"--{field} has no effect with --objective {name}",
            found=value,
            fix=f"--objective {objectives[0]}, or leave --{field} out",
        )
    for settings, objective in ((config.distillation, "distill"), (config.rewards, "grpo")):
        if name == objective:
            continue
        usual: Any = DistillationConfig() if objective == "distill" else RewardConfig()
        for field in vars(usual):
            value = getattr(settings, field)
            findings.check(
                value == getattr(usual, field),
                f"--{field} has no effect without --objective {objective}",
                found=value,
                fix=f"--objective {objective}",
            )


def _check_rows(config: TrainConfig, findings: Findings) -> None:
    """What holds for pairs and for prompts, whose rows are several sequences."""
    name, data = config.objective.objective, config.data
    whole = (
        "preferences compare whole answers, so that their loss does not add up over the chunks of --infctx"
        if name in PREFERENCES else "answers of --objective grpo are judged as a whole, not in chunks of --infctx"
    )
    findings.check(not config.long_context.infctx, whole, found=f"--objective {name}",
                   fix="leave --infctx out, with a smaller --ctx_len or --micro_bsz, or --grad_cp 1 to save memory")
    findings.check(
        data.dataload == "pad" and not data.length_buckets,
        f"--objective {name} makes rows its own way, and --dataload and --length_buckets have no effect",
        found=f"--dataload {data.dataload}",
        fix="leave both out",
    )
    findings.check(
        data.loss_mask in ("none", "qa"),
        f"--objective {name} goes by answers, and --loss_mask has no effect",
        found=data.loss_mask,
        fix="leave --loss_mask out",
    )
    findings.check(
        data.data_type in ("binidx", "jsonl", "sft"),
        f"--objective {name} reads records: jsonl, csv, parquet or a dataset of Hugging Face",
        found=f"--data_type {data.data_type}",
        fix="--data_file FILE.jsonl",
    )
    findings.check(
        "binidx" not in _kinds(data),
        f"--objective {name} reads records, and binidx holds tokens alone",
        found=data.data_file,
        fix="--data_file FILE.jsonl",
    )
    findings.check(not config.runtime.cuda_graph, f"--objective {name} cannot be recorded as a CUDA graph: its batches "
                   "differ in size", found="--cuda_graph", fix="leave --cuda_graph out")
    findings.check(not config.model.head_qk, f"--objective {name} goes on from the state of a prompt, which does not "
                   "hold what --head_qk looks back at", found=config.model.head_qk, fix="--head_qk 0")
    findings.check(not config.method.label_smoothing, f"--label_smoothing has no effect with --objective {name}",
                   found=config.method.label_smoothing,
                   fix="--flip_share" if name in PREFERENCES else "leave it out")
    findings.check(not config.method.neftune_alpha, f"--neftune_alpha has no effect with --objective {name}",
                   found=config.method.neftune_alpha, fix="leave it out")
    findings.check(config.schedule.train_stage == 0, f"--train_stage is pre-training, and --objective {name} is not",
                   found=config.schedule.train_stage, fix="leave --train_stage out")


def _kinds(data: DataConfig) -> list[str]:
    """The formats of the parts of the data; none where they are not named as they should be, which is told elsewhere.
    """
    try:
        return [format_of(part.path, data.data_type) for part in data_files(data.data_file)] if data.data_file else []
    except UserError:
        return []


def _check_preferences(config: TrainConfig, findings: Findings) -> None:
    objective = config.objective
    findings.check(objective.beta is None or objective.beta > 0, "--beta must be above 0", found=objective.beta)
    findings.check(objective.sft_share is None or objective.sft_share >= 0, "--sft_share is too small",
                   found=objective.sft_share, expected="0 or more")
    findings.check(0 <= objective.flip_share < 0.5, "--flip_share is out of range", found=objective.flip_share,
                   expected="0 up to below 0.5: beyond, the other answer would be the better one")
    for name in ("kto_desirable", "kto_undesirable"):
        value = getattr(objective, name)
        findings.check(value >= 0, f"--{name} is too small", found=value, expected="0 or more")
    findings.check(
        not config.runtime.strategy.startswith("deepspeed_stage_3"),
        "preferences read prompts and answers in two passes of one step, and DeepSpeed's stage 3 follows one alone",
        found=f"--strategy {config.runtime.strategy}",
        fix="--strategy fsdp, which splits everything too, or deepspeed_stage_2",
    )
    full = config.method.peft == "none" and not config.method.layer_profile
    findings.check(
        objective.reference != "base" or not full,
        "--reference base switches the adapter off, and --peft none has none",
        found="--peft none",
        fix="--reference start, or --peft lora",
    )
    findings.check(
        objective.reference != "base" or config.runtime.strategy not in SPLITS_WEIGHTS,
        "--reference base switches the adapter off in each step, which split weights do not allow",
        found=f"--strategy {config.runtime.strategy}",
        fix="--reference start, which is the same for a new adapter",
    )


def _check_distillation(config: TrainConfig, findings: Findings) -> None:
    distillation = config.distillation
    findings.check(bool(distillation.teacher), "--objective distill needs a teacher",
                   fix="--teacher MODEL.pth, or --teacher FOLDER that python -m rwkvpeft.teacher wrote")
    findings.check(0 <= distillation.distill_alpha <= 1, "--distill_alpha is out of range",
                   found=distillation.distill_alpha, expected="0 to 1")
    findings.check(1e-6 <= distillation.distill_temperature <= 1e6, "--distill_temperature must be above 0",
                   found=distillation.distill_temperature, expected="1e-6 to 1e6")
    findings.check(distillation.distill_top_k >= 0, "--distill_top_k is too small", found=distillation.distill_top_k,
                   expected="0 or more")
    findings.check(not config.runtime.cuda_graph, "--objective distill cannot be recorded as a CUDA graph: a batch "
                   "holds the teacher's words too", found="--cuda_graph", fix="leave --cuda_graph out")


def _check_rewards(config: TrainConfig, findings: Findings) -> None:
    rewards = config.rewards
    looks_only = config.data.check or config.data.preview > 0
    findings.check(bool(rewards.reward) or looks_only, "--objective grpo needs a function that judges answers",
                   fix="--reward FILE.py:FUNCTION")
    for name, least in (("group_size", 2), ("answer_tokens", 1), ("clip_low", 0), ("clip_high", 0), ("kl_beta", 0),
                        ("policy_steps", 1)):
        value = getattr(rewards, name)
        findings.check(value >= least, f"--{name} is too small", found=value, expected=f"{least} or more")
    findings.check(1e-6 <= rewards.answer_temperature <= 1e6, "--answer_temperature must be above 0: answers are to "
                   "differ", found=rewards.answer_temperature, expected="1e-6 to 1e6")
    findings.check(0 < rewards.answer_top_p <= 1, "--answer_top_p is out of range", found=rewards.answer_top_p,
                   expected="above 0, up to 1")
    findings.check(rewards.clip_low < 1, "--clip_low is out of range", found=rewards.clip_low,
                   expected="0 up to below 1: a ratio of probabilities cannot fall below 0")
    findings.check(not config.method.dropout, "--dropout makes other probabilities than those that answers of "
                   "--objective grpo are drawn with", found=config.method.dropout, fix="leave --dropout out")
    full = config.method.peft == "none" and not config.method.layer_profile
    findings.check(
        rewards.kl_beta == 0 or not full,
        "--kl_beta compares with the model with the adapter switched off, and --peft none has none",
        found=rewards.kl_beta,
        fix="--kl_beta 0, or --peft lora",
    )
    findings.check(
        config.runtime.strategy not in SPLITS_WEIGHTS,
        "--objective grpo draws answers token by token, for which every device needs all weights",
        found=f"--strategy {config.runtime.strategy}",
        fix="--strategy ddp, deepspeed_stage_1 or deepspeed_stage_2",
    )


def check_objective_files(config: TrainConfig, findings: Findings) -> None:
    """Note a teacher that is not there."""
    teacher = config.distillation.teacher
    if config.objective.objective == "distill" and teacher and not Path(teacher).exists():
        findings.add("--teacher names neither a file nor a folder", found=teacher, fix="check the path")
