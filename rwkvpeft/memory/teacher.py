"""What a live teacher takes beside the model that learns."""

from __future__ import annotations

from pathlib import Path

from rwkvpeft.checkpoints.files import MappedTensors
from rwkvpeft.checkpoints.quantised import find_packed
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.memory.outline import DTYPES


def teacher_bytes(config: TrainConfig) -> int:
    """Bytes of its weights on each device, in the run's precision, or as its file packs them; 0 without one.

    Raises: UserError if the file cannot be read.
    """
    path = Path(config.distillation.teacher)
    if config.objective.objective != "distill" or not path.is_file():
        return 0
    tensors = MappedTensors(path)
    if find_packed(tensors, str(path)):
        return sum(tensor.nbytes for tensor in tensors.values())
    numbers = DTYPES[config.runtime.precision or "fp32"].itemsize
    return numbers * sum(tensor.numel() for tensor in tensors.values())
