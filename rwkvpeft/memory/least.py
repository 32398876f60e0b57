"""The least a run needs, to refuse what no luck can fit before anything is loaded.

Everything counted is certainly there at one moment; temporaries, caches and the allocator's slack are left out.
"""

from __future__ import annotations

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
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.registry import OPTIMIZERS, find

_LOGIT_ROWS = 256
# (B, T, C) tensors a block keeps for its backward pass, however well its parts are written, by --grad_cp
_KEPT_PER_BLOCK = {"0": 12, "selective": 8, "1": 1, "auto": 1}
_SHORT_CONTEXT = 512
_SHORT_CHUNK = 256


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
        weights=resting.frozen + wide * resting.trained + resting.copies,
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
    refuse_if_too_large(need, memory_of_each(device_type, config.runtime), config)


def refuse_if_too_large(need: Least, available: int | None, config: TrainConfig) -> None:
    """Raises: UserError if ``need`` is more than ``available`` bytes."""
    if available is None or need.total <= available:
        return
    raise UserError(
        "this run cannot fit into memory",
        found=f"{_gb(available)} GB there",
        expected=f"at least {_gb(need.total)} GB: weights {_gb(need.weights)}, optimizer {_gb(need.optimizer)}, "
        f"and gradients {_gb(need.gradients)} or activations {_gb(need.activations)} and logits {_gb(need.logits)}",
        fix=", or ".join(ways_out(config, need)[:3]) or "a smaller model",
    )


def ways_out(config: TrainConfig, need: Least | None = None) -> list[str]:
    """Flags that make a run smaller, the cheapest first; those that go to the root of ``need``, if it is known."""
    schedule, runtime, method = config.schedule, config.runtime, config.method
    ways = []
    if schedule.micro_bsz > 1:
        batches = schedule.micro_bsz * schedule.accumulate_grad_batches
        ways.append(f"--micro_bsz 1 --accumulate_grad_batches {batches}")
    # where auto was to choose, a run that failed all the same may have been taken for smaller than it is
    if runtime.grad_cp in ("0", "selective") or (runtime.grad_cp == "auto" and need is None):
        ways.append("--grad_cp 1")
    if runtime.precision in ("fp32", "tf32", "fp64") and method.peft != "none":
        ways.append("--precision bf16")
    ways += _shorter(config)
    weights_first = need is not None and need.total - need.activations - need.logits > need.activations
    if method.peft == "none":
        ways.insert(0 if weights_first else len(ways), "--peft lora")
    elif method.quant == "none":
        ways.insert(0 if weights_first else len(ways), "--quant nf4")
    return ways


def _shorter(config: TrainConfig) -> list[str]:
    long, length = config.long_context, config.data.ctx_len or 0
    if long.infctx and length > long.chunk_ctx > _SHORT_CHUNK:
        return [f"--chunk_ctx {_SHORT_CHUNK}"]
    if length <= _SHORT_CONTEXT:
        return []
    chunks = config.data.dataload == "pack" or config.runtime.cuda_graph or config.model.head_qk or long.infctx
    return [*([] if chunks else ["--infctx --infctx_grad exact"]), f"--ctx_len {_SHORT_CONTEXT}"]


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"
