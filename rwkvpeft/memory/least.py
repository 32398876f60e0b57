"""The least a run needs, to refuse what no luck can fit before anything is loaded.

Everything counted is certainly there at one moment; temporaries, caches and the allocator's slack are left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from rwkvpeft.checkpoints.quantised import Quantisation
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.splitting_batches import in_smallest_parts
from rwkvpeft.errors import UserError
from rwkvpeft.memory.chunks import bytes_of_states
from rwkvpeft.memory.dry_run import Moment
from rwkvpeft.memory.machine import memory_of_each
from rwkvpeft.memory.outline import DTYPES, UNPACKED, MakeAdapter, NoOutline, counts_of
from rwkvpeft.memory.sharing import STEP, gradients_at, held
from rwkvpeft.memory.teacher import teacher_bytes
from rwkvpeft.memory.ways import NeedOf, cheapest_ways
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.registry import OPTIMIZERS, find

_LOGIT_ROWS = 256
# (B, T, C) tensors a block keeps for its backward pass, however well its parts are written, by --grad_cp
_KEPT_PER_BLOCK = {"0": 12, "selective": 8, "1": 1, "auto": 1}


class Least(NamedTuple):
    """Bytes on each device.

    ``weights`` and ``optimizer`` are there throughout. ``gradients`` are complete when the optimizer takes its step;
    ``activations`` (what the forward pass keeps) and ``logits`` are there when the loss is worked out.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """What is needed at the worse of those two moments."""
        return self.weights + self.optimizer + max(self.gradients, self.activations + self.logits)


def least_need(
    shape: ModelShape,
    config: TrainConfig,
    make_adapter: MakeAdapter,
    packed: Quantisation = UNPACKED,
) -> Least:
    """A lower bound of what a run needs on each device. Rows that may be short count as one token.

    Args:
        packed: how the base's own file stores its large linears.
    Raises: UserError if the settings do not suit the model's sizes; NoOutline.
    """
    counts = counts_of(shape, config, make_adapter, packed)
    numbers = DTYPES[config.runtime.precision or "fp32"].itemsize
    moments: int = find(OPTIMIZERS, config.optimizer.optim, flag="--optim").moment_bytes
    resting, wide = held(counts, moments, config.runtime), max(numbers, 4) // 4
    all_gradients = Moment(4 * counts.trained, 4 * counts.trained)
    varies = config.data.rows_vary
    rows = config.schedule.micro_bsz * (1 if varies else config.tokens_at_once)
    states = 0 if varies else bytes_of_states(shape, config, beyond=2)
    kept = counts.layers * _KEPT_PER_BLOCK[config.runtime.grad_cp]
    return Least(
        weights=resting.frozen + teacher_bytes(config) + wide * resting.trained + resting.copies,
        optimizer=resting.optimizer,
        gradients=wide * gradients_at(all_gradients, STEP, counts, config.runtime),
        activations=kept * rows * shape.n_embd * numbers + states,
        logits=min(_LOGIT_ROWS, rows) * shape.vocab_size * numbers,
    )


def check_memory(
    shape: ModelShape,
    config: TrainConfig,
    make_adapter: MakeAdapter,
    packed: Quantisation = UNPACKED,
) -> None:
    """Compare a run's least need with all the memory its device has. Arguments as ``least_need``.

    Batches that ``--micro_split auto`` may cut count as single rows.
    Raises: UserError if it cannot fit, with up to three ways out, the cheapest first.
    """
    config = in_smallest_parts(config)
    device_type = "cuda" if config.runtime.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    if config.runtime.accelerator == "gpu" and device_type == "cpu":
        return
    try:
        need = least_need(shape, config, make_adapter, packed)
    except NoOutline:
        # the run itself will show
        return
    def need_of(settings: TrainConfig) -> int | None:
        # the adapter of another method is not at hand
        same = settings.method.peft == config.method.peft
        return least_need(shape, settings, make_adapter, packed).total if same else None

    # counted as if whole blocks were computed twice already
    level = "1" if config.runtime.grad_cp == "auto" else config.runtime.grad_cp
    config = replace(config, runtime=replace(config.runtime, grad_cp=level))
    refuse_if_too_large(need, memory_of_each(device_type, config.runtime), config, need_of)


def refuse_if_too_large(
    need: Least, available: int | None, config: TrainConfig, need_of: NeedOf | None = None
) -> None:
    """Raises: UserError if ``need`` is more than ``available`` bytes, with up to three ways out, the cheapest first.

    Args:
        need_of: the least of a run with other settings, to say what each way saves.
    """
    if available is None or need.total <= available:
        return
    weights_first = need.total - need.activations - need.logits > need.activations
    ways = cheapest_ways(config, need_of, weights_first=weights_first)
    raise UserError(
        "this run cannot fit into memory",
        found=f"{_gb(available)} there",
        expected=f"at least {_gb(need.total)}: weights {_gb(need.weights)}, optimizer {_gb(need.optimizer)}, "
        f"and gradients {_gb(need.gradients)} or activations {_gb(need.activations)} and logits {_gb(need.logits)}",
        fix=", or ".join(ways) or "a smaller model",
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
