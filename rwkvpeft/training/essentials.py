"""What a run may not change on its way: the settings and files that decide what it computes.

How its rows are split into batches is not among them, nor how many processes share them and how: an optimizer step
takes the same rows whatever the split. What must stay are the rows of a step and those of a mini-epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import gcd
from pathlib import Path
from typing import Any

from torch import nn

from rwkvpeft.checkpoints.adapter import Recipe
from rwkvpeft.checkpoints.files import fingerprint
from rwkvpeft.config.data_files import data_files
from rwkvpeft.config.groups import DataConfig, TrainConfig
from rwkvpeft.config.objective import DistillationConfig, ObjectiveConfig, RewardConfig
from rwkvpeft.config.splitting_batches import other_noise
from rwkvpeft.data.label_index import INDEX
from rwkvpeft.errors import UserError
from rwkvpeft.models.recompute import draws_random_numbers
from rwkvpeft.training.module import RunPlan
from rwkvpeft.training.resume import ResumePoint, as_written

_STEP_ROWS = "rows of a step"
_EPOCH_ROWS = "rows of a mini-epoch"
_BATCH_ROWS = "rows of a batch on all devices"
_FIRST_DIFFERENCES = 8


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
        **_row_counts(plan, whole_batches=data.length_buckets),
        **{name: getattr(schedule, name) for name in ("epoch_count", "epoch_begin", "lr_init", "lr_final",
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
        **asdict(config.objective),
        **asdict(config.distillation) | {"teacher": _teacher_stamp(config.distillation.teacher)},
        **asdict(config.rewards),
        "adapter": _stamp(Path(config.method.adapter)),
        **{name: getattr(config.method, name) for name in ("dropout", "label_smoothing", "neftune_alpha")},
        "precision": runtime.precision,
        "random_seed": runtime.random_seed,
    }


def _row_counts(plan: RunPlan, *, whole_batches: bool) -> dict[str, int]:
    """The rows that belong together; those of a batch only where ``--length_buckets`` picks them by their number."""
    batches = min(plan.accumulate_grad_batches, plan.epoch_steps)
    counts = {_STEP_ROWS: batches * plan.rows_at_once, _EPOCH_ROWS: plan.epoch_steps * plan.rows_at_once}
    return counts | {_BATCH_ROWS: plan.rows_at_once} if whole_batches else counts


def check_essentials(point: ResumePoint, essentials: Mapping[str, Any], config: TrainConfig) -> None:
    """Compare the settings a run may not change on its way.

    Raises: UserError naming each that differs, and the flags with which rows of the same number belong together.
    """
    current = as_written(essentials)
    saved = {name: value for name, value in _before_objectives().items() if name in current} | dict(point.essentials)
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if not names:
        return
    shown = names[:_FIRST_DIFFERENCES]
    anew = "--resume none to start anew, or another --proj_dir"
    fix = f"the earlier settings, {anew}"
    if set(names) <= {_STEP_ROWS, _EPOCH_ROWS, _BATCH_ROWS}:
        fix = f"{_fitting_split(saved, config)}; {anew}"
    raise UserError(
        f"the run in {point.path.parent} was started with other settings and cannot go on with these",
        found=", ".join(_shown(name, current) for name in shown),
        expected=", ".join(_shown(name, saved) for name in shown),
        fix=fix,
    )


def _before_objectives() -> dict[str, Any]:
    """What a run did that began before there were objectives to choose from, and whose point does not tell."""
    return as_written(asdict(ObjectiveConfig()) | asdict(DistillationConfig()) | asdict(RewardConfig()))


def _shown(name: str, settings: Mapping[str, Any]) -> str:
    value = settings.get(name)
    return f"no {name} given" if value is None else f"{name} {value}"


def split_of(config: TrainConfig) -> dict[str, Any]:
    """How the rows of an optimizer step are dealt out: what may change, and is worth knowing."""
    runtime = config.runtime
    return {"micro_bsz": config.schedule.micro_bsz, "processes": runtime.devices * runtime.num_nodes}


def what_splits_otherwise(point: ResumePoint, config: TrainConfig, model: nn.Module) -> str | None:
    """What is no longer bit for bit what it would have been, because the rows are now dealt out otherwise.

    None where they are not, or where nothing but the order of sums depends on it.
    """
    if dict(point.standing.split) == split_of(config):
        return None
    reason = other_results(config, model)
    if reason is None:
        return None
    before = ", ".join(f"{name} {value}" for name, value in point.standing.split.items())
    return f"rows were dealt out otherwise before ({before}): the same rows follow, but {reason}"


def other_results(config: TrainConfig, model: nn.Module) -> str | None:
    """Why the same rows in other batches give other results; None if they do not, but for the order of sums.

    Args:
        model: with its adapter, which may have a dropout of its own.
    """
    reason = other_noise(config)
    return "what dropout draws is drawn for each batch" if reason is None and draws_random_numbers(model) else reason


def _fitting_split(saved: Mapping[str, Any], config: TrainConfig) -> str:
    """Flags with which the devices of ``config`` take the rows that belonged together before."""
    processes = config.runtime.devices * config.runtime.num_nodes
    asked, together = config.schedule.micro_bsz, gcd(saved[_STEP_ROWS], saved[_EPOCH_ROWS])
    if _BATCH_ROWS in saved:
        # with --length_buckets the rows of a batch must stay together too
        asked, exact = divmod(saved[_BATCH_ROWS], processes)
        sizes = [asked] if not exact else []
    else:
        sizes = [size for size in range(min(asked, together), 0, -1) if together % (size * processes) == 0]
    if not sizes:
        return f"a number of processes that divides {saved.get(_BATCH_ROWS, together)}"
    rows = sizes[0] * processes
    words = [f"--accumulate_grad_batches {saved[_STEP_ROWS] // rows}", f"--epoch_steps {saved[_EPOCH_ROWS] // rows}"]
    return " ".join(words if sizes[0] == config.schedule.micro_bsz else [f"--micro_bsz {sizes[0]}", *words])


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


def _teacher_stamp(teacher: str) -> str:
    """That of a model, or of the index of its labels, which names what made them; nothing without a teacher."""
    if not teacher:
        # the path without a name is a folder: the one that the run was started in
        return ""
    path = Path(teacher)
    return _stamp(path / INDEX if path.is_dir() else path)


def _stamp(path: Path) -> str:
    """A file's name and what tells it from others of its size."""
    return f"{path.name}, {path.stat().st_size} bytes, {fingerprint(path)[:8]}" if path.is_file() else path.name
