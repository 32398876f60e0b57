"""What a run may not change on its way: the settings and files that decide what it computes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rwkvpeft.checkpoints.adapter import Recipe
from rwkvpeft.checkpoints.files import fingerprint
from rwkvpeft.config.data_files import data_files
from rwkvpeft.config.groups import DataConfig, TrainConfig
from rwkvpeft.training.module import RunPlan


def essential_settings(config: TrainConfig, recipe: Recipe, plan: RunPlan) -> dict[str, Any]:
    """What a run may not change on its way, by the name of the flag where there is one."""
    data, schedule, runtime = config.data, config.schedule, config.runtime
    return {
        "base model": recipe.base_fingerprint,
        "head_size_divisor": config.model.head_size_divisor,
        "data": _data_stamp(data.data_file),
        "masks": _mask_stamps(data),
        **{name: getattr(data, name) for name in ("ctx_len", "dataload", "loss_mask", "mask_think", "mask_id",
                                                  "data_shuffle", "length_buckets",
                                                  "tokenizer", "text_key", "data_type",
                                                  "sft_field", "sft_split", "my_sample_len", "magic_prime")},
        "epoch_steps": plan.epoch_steps,
        **{name: getattr(schedule, name) for name in ("epoch_count", "epoch_begin", "micro_bsz",
                                                      "accumulate_grad_batches", "lr_init", "lr_final",
                                                      "warmup_steps", "lr_schedule", "my_exit_tokens",
                                                      "train_stage")},
        "mini-epochs before": plan.begun,
        **asdict(config.optimizer),
        # held-out losses of other data could not be compared
        **{name: _data_stamp(getattr(config.evaluation, name)) for name in ("val_data_file", "general_data_file")},
        "val_split": config.evaluation.val_split,
        **{name: getattr(config.long_context, name) for name in ("infctx", "chunk_ctx", "infctx_grad")},
        "peft": recipe.method,
        "peft_config": recipe.config,
        "quant": recipe.quant,
        "quant_double": recipe.quant_double,
        "quant_head": recipe.quant_head,
        "train_parts": recipe.train_parts,
        "adapter": _stamp(Path(config.method.adapter)),
        **{name: getattr(config.method, name) for name in ("dropout", "label_smoothing", "neftune_alpha")},
        "precision": runtime.precision,
        "devices": runtime.devices,
        "num_nodes": runtime.num_nodes,
        "random_seed": runtime.random_seed,
    }


def _data_stamp(data_file: str) -> str:
    parts = data_files(data_file) if data_file else []
    if len(parts) == 1:
        return _file_stamp(parts[0].path)
    return "; ".join(f"{_file_stamp(part.path)}, share {part.share}" for part in parts)


def _file_stamp(data_file: str) -> str:
    for path in (Path(data_file), Path(f"{data_file}.bin")):
        if path.is_file():
            return _stamp(path)
    return data_file


def _mask_stamps(data: DataConfig) -> list[str]:
    """The masks beside binidx that the run goes by."""
    if data.loss_mask not in ("qa", "last") and not data.mask_think:
        return []
    masks = (Path(f"{part.path}.mask") for part in (data_files(data.data_file) if data.data_file else ()))
    return [_stamp(mask) for mask in masks if mask.is_file()]


def _stamp(path: Path) -> str:
    """A file's name and what tells it from others of its size."""
    return f"{path.name}, {path.stat().st_size} bytes, {fingerprint(path)[:8]}" if path.is_file() else path.name
