"""What a teacher takes beside the model that learns."""

from __future__ import annotations

from pathlib import Path

from rwkvpeft.checkpoints.files import MappedTensors
from rwkvpeft.checkpoints.quantised import find_packed
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.label_index import read_index
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


def words_bytes(config: TrainConfig, vocabulary: int) -> int:
    """Bytes of what a teacher says of a micro-batch, whole rows of it, on each device; 0 without one.

    Raises: UserError for a folder without labels.
    """
    if config.objective.objective != "distill":
        return 0
    folder = Path(config.distillation.teacher)
    told_apart = read_index(folder).top_k if folder.is_dir() else vocabulary
    told_apart = min(config.distillation.distill_top_k, told_apart) or told_apart
    # 32 bits for each token's id and for its log-probability, and for the rest
    return config.schedule.micro_bsz * (config.data.ctx_len or 1) * (8 * told_apart + 4)
