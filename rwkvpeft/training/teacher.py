"""The teacher of a run: a model that is asked about each batch, or what it said of the data before."""

from __future__ import annotations

from pathlib import Path

import torch

from rwkvpeft.checkpoints.adapter import load_recipe
from rwkvpeft.checkpoints.files import MappedTensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.quantised import find_packed, model_outline
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.rows import RowDataset
from rwkvpeft.data.teacher_labels import TeacherLabels, with_labels
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.shape import ModelShape, read_shape
from rwkvpeft.objectives.distillation import require_same_vocabulary
from rwkvpeft.training.devices import COMPUTE_DTYPES

_DIVISOR = 8


def taught_rows(config: TrainConfig, shape: ModelShape, rows: RowDataset) -> RowDataset:
    """The rows to train on, with the teacher's words beside them if they are stored. Nothing large is read.

    Args:
        shape: of the model that learns.
    Raises: UserError if the teacher is no model and no folder of labels, has another vocabulary, or the labels are not
        those of the data.
    """
    if config.objective.objective != "distill":
        return rows
    teacher, settings = Path(config.distillation.teacher), config.distillation
    if not teacher.is_dir():
        require_same_vocabulary(shape, _shape_of(teacher).vocab_size, str(teacher))
        return rows
    labels = TeacherLabels(teacher, top_k=settings.distill_top_k, temperature=settings.distill_temperature)
    require_same_vocabulary(shape, labels.index.vocab_size, str(teacher))
    return with_labels(rows, labels)


def load_teacher(config: TrainConfig, device: torch.device | str) -> Rwkv | None:
    """The run's live teacher: frozen, at rest, in the run's precision, its large matrices quantised if its file has
    them so. None for a run without one, and for stored labels.

    Raises: UserError if the file does not fit, or no program can run it on the device.
    """
    teacher = Path(config.distillation.teacher)
    if config.objective.objective != "distill" or teacher.is_dir():
        return None
    recipe = load_recipe(teacher)
    model = load_model(
        teacher,
        device=device,
        dtype=COMPUTE_DTYPES[config.runtime.precision or "fp32"],
        op=config.runtime.op,
        head_size_divisor=recipe.head_size_divisor if recipe else _DIVISOR,
    )
    return model.requires_grad_(False)


def _shape_of(teacher: Path) -> ModelShape:
    tensors = MappedTensors(teacher)
    return read_shape(model_outline(tensors, find_packed(tensors, str(teacher))), str(teacher))
