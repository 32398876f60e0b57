"""Whether a strategy goes with the other settings of a run."""

from __future__ import annotations

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import RuntimeConfig, TrainConfig
from rwkvpeft.config.methods import members
from rwkvpeft.registry import ADAPTERS

# those whose step on a number knows nothing but that number's own gradient and moments
_STEPS_NUMBER_BY_NUMBER = ("none", "adam", "adamw")


def check_strategy(config: TrainConfig, findings: Findings) -> None:
    """Note every setting that the strategy cannot honour, and DeepSpeed's own settings where it does not run."""
    name = config.runtime.strategy
    zero = name.startswith("deepspeed")
    splits_weights = name == "fsdp" or name.startswith("deepspeed_stage_3")
    if not zero:
        _check_unused(config.runtime, findings)
    findings.check(
        config.runtime.ds_bucket_mb > 0, "--ds_bucket_mb is too small", found=config.runtime.ds_bucket_mb,
        expected="1 or more",
    )
    if zero or splits_weights:
        _check_split_steps(config, findings, name)
    if zero:
        findings.check(
            config.runtime.precision != "fp64",
            f"--strategy {name} adds up gradients in fp32",
            found="--precision fp64",
            fix="--strategy ddp or fsdp",
        )
    if splits_weights:
        _check_split_weights(config, findings, name)


def _check_unused(runtime: RuntimeConfig, findings: Findings) -> None:
    usual = RuntimeConfig()
    for field in ("ds_bucket_mb", "ds_config"):
        findings.check(
            getattr(runtime, field) == getattr(usual, field),
            f"--{field} has no effect with --strategy {runtime.strategy}",
            found=getattr(runtime, field),
            fix="--strategy deepspeed_stage_2",
        )


def _check_split_steps(config: TrainConfig, findings: Findings, name: str) -> None:
    """Each process takes the optimizer's step for a part of the numbers."""
    findings.check(
        config.optimizer.optim in _STEPS_NUMBER_BY_NUMBER,
        f"--strategy {name} cuts matrices into parts, which --optim {config.optimizer.optim} must see whole",
        expected=[f"--optim {optim}" for optim in _STEPS_NUMBER_BY_NUMBER],
        fix="--optim adam, or --strategy ddp",
    )
    findings.check(
        config.runtime.precision != "fp16",
        f"--strategy {name} has no gradient scaler, which fp16 needs",
        found="--precision fp16",
        fix="--precision bf16 or fp32, or --strategy ddp",
    )
    findings.check(
        not config.runtime.cuda_graph,
        f"--strategy {name} communicates within a step, which cannot be recorded as a CUDA graph",
        found="--cuda_graph",
        fix="leave one of the two out",
    )
    findings.check(
        not config.evaluation.log_parts,
        f"--strategy {name} gives no process the whole gradients that --log_parts measures",
        found=config.evaluation.log_parts,
        fix="--log_parts 0, or --strategy ddp",
    )
    findings.check(
        "adalora" not in members(config.method.peft),
        f"--strategy {name} gives no process the whole gradients that adalora goes by",
        fix="--peft lora, or --strategy ddp",
    )


def _check_split_weights(config: TrainConfig, findings: Findings, name: str) -> None:
    """No process has the model's weights whole."""
    findings.check(
        not config.long_context.infctx,
        f"--infctx needs whole weights on each device, and --strategy {name} splits them",
        found="--infctx",
        fix="--strategy deepspeed_stage_2",
    )
    others = [method for method in members(config.method.peft) if method not in ADAPTERS]
    findings.check(
        not others,
        f"--strategy {name} splits the weights that a tuner of Hugging Face peft wants whole",
        found=others,
        fix="--strategy deepspeed_stage_2",
    )
