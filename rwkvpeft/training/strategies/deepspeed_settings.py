"""The settings DeepSpeed is given: ours, and over them those of ``--ds_config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rwkvpeft.config.groups import RuntimeConfig, TrainConfig
from rwkvpeft.errors import UserError
from rwkvpeft.reading import LARGEST_RECORD_BYTES, read_text

OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "activation_checkpointing")
"""What other flags say, so that a file must not."""


def read_stage(strategy: str) -> int:
    """The N of ``deepspeed_stage_N``."""
    return int(strategy.removeprefix("deepspeed_stage_").partition("_")[0])


def deepspeed_settings(config: TrainConfig, device_type: str) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given.

    Raises: UserError if ``--ds_config`` is no JSON object, or says what is another flag's.
    """
    runtime = config.runtime
    numbers = runtime.ds_bucket_mb * 1_000_000
    on_gpu = device_type == "cuda"
    zero: dict[str, Any] = {
        "stage": read_stage(runtime.strategy),
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # a CPU has no second stream to communicate on
        "overlap_comm": on_gpu,
        "reduce_bucket_size": numbers,
        "allgather_bucket_size": numbers,
        "stage3_prefetch_bucket_size": numbers,
        # DeepSpeed's own billion would leave most models gathered once they have been
        "stage3_max_live_parameters": numbers,
        "stage3_max_reuse_distance": numbers,
        # small vectors are not worth a gathering
        "stage3_param_persistence_threshold": 10_000,
    }
    if runtime.strategy.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.schedule.micro_bsz,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # PyTorch's own fused Adam runs on CPUs too, and needs no compiler
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
    return _over(ours, _read(runtime)) if runtime.ds_config else ours


def fit_buckets(settings: dict[str, Any], *, trained: int, weights: int) -> dict[str, Any]:
    """Make no buffer larger than all that could ever be in it.

    Args:
        trained, weights: numbers that are trained, and all numbers of the model's parameters.
    """
    zero = dict(settings["zero_optimization"])
    for name, most in (("reduce_bucket_size", trained), ("allgather_bucket_size", trained),
                       ("stage3_prefetch_bucket_size", weights)):
        if isinstance(zero.get(name), int):
            zero[name] = max(1, min(zero[name], most))
    return {**settings, "zero_optimization": zero}


def _read(runtime: RuntimeConfig) -> dict[str, Any]:
    path = Path(runtime.ds_config)
    try:
        found = json.loads(read_text(path, LARGEST_RECORD_BYTES))
    except (OSError, ValueError, RecursionError) as reason:
        raise UserError(f"--ds_config {path} cannot be read", found=reason, expected="a JSON file") from reason
    if not isinstance(found, dict):
        raise UserError(f"--ds_config {path} is no JSON object", found=type(found).__name__)
    said = [name for name in OURS if name in found]
    if said:
        raise UserError(
            f"--ds_config {path} says what other flags say",
            found=said,
            fix="leave them out: --micro_bsz, --accumulate_grad_batches, --grad_clip, --optim, --precision, --grad_cp",
        )
    zero = found.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"--ds_config {path}: zero_optimization is no object", found=zero, expected='{"stage": 2, ...}')
    stage = zero.get("stage", read_stage(runtime.strategy))
    if stage != read_stage(runtime.strategy):
        raise UserError(
            f"--ds_config {path} is of another stage", found=stage, fix=f"--strategy deepspeed_stage_{stage}"
        )
    return found


def _over(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """``theirs`` in place of ``ours``, section by section."""
    merged = dict(ours)
    for name, value in theirs.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _over(merged[name], value) if both else value
    return merged
