"""How much memory a run needs at the very least, to refuse what no luck can fit before anything is loaded.

A lower bound: everything counted is certainly there at the peak; temporaries, caches and the allocator's slack are
left out. Letters: B rows, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from rwkvpeft.config.groups import MethodConfig, TrainConfig
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.registry import OPTIMIZERS, find

_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_LOGIT_ROWS = 256
# (B, T, C) tensors a block keeps for its backward pass, however well its parts are written
_KEPT_PER_BLOCK = 12
_DEFAULT_LORA_RANK = 8
_SHORT_CONTEXT = 512


class Need(NamedTuple):
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def count_parameters(shape: ModelShape) -> int:
    """Numbers in a model's matrices and tables; its vectors are left out."""
    ranks = (
        shape.decay_rank + shape.learning_rate_rank + shape.value_rank + shape.gate_rank + 5 * shape.mix_rank
    )
    low_rank = ranks * (shape.n_embd + shape.dim_att)
    linears = sum(rows * columns for rows, columns in _linears(shape))
    return shape.n_layer * (linears + low_rank) + 2 * shape.vocab_size * shape.n_embd


def count_trained(shape: ModelShape, method: MethodConfig) -> int:
    """Numbers that are trained, at the least."""
    if method.peft == "none":
        return count_parameters(shape)
    if method.peft == "state":
        return shape.n_layer * shape.n_head * shape.head_size**2
    tables = sum(part in method.train_parts for part in ("emb", "head"))
    rank = method.peft_config.get("r", _DEFAULT_LORA_RANK)
    adapted = not method.peft_config.get("target_modules") and isinstance(rank, int)
    factors = rank * sum(rows + columns for rows, columns in _linears(shape)) if adapted else 0
    return shape.n_layer * factors + tables * shape.vocab_size * shape.n_embd


def _linears(shape: ModelShape) -> list[tuple[int, int]]:
    """The large linears of one block, (out, in)."""
    gated = shape.version != "x070"
    att = [(shape.dim_att, shape.n_embd)] * (4 + gated)
    ffn = [(shape.dim_ffn, shape.n_embd)] * 2 + [(shape.n_embd, shape.n_embd)] * gated
    return att + ffn


def estimate(
    *,
    parameters: int,
    trained: int,
    frozen_bytes: int,
    activation_bytes: int,
    rows: int,
    tokens: int,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    checkpointing: bool,
    moment_bytes: int,
) -> Need:
    """A lower bound of what a training step needs.

    Args:
        parameters, trained: how many numbers the base has and how many are trained (in fp32).
        frozen_bytes: of one frozen number; 0 if all of the base is trained.
        rows, tokens: B and T of a micro-batch.
        checkpointing: whether blocks are recomputed in the backward pass.
        moment_bytes: what the optimizer keeps on the device for each trained number.
    """
    stream = rows * tokens * n_embd * activation_bytes
    kept = n_layer + _KEPT_PER_BLOCK if checkpointing else n_layer * _KEPT_PER_BLOCK
    return Need(
        weights=parameters * frozen_bytes + trained * 4,
        gradients=trained * 4,
        optimizer=trained * moment_bytes,
        activations=kept * stream,
        logits=min(_LOGIT_ROWS, rows * tokens) * vocab_size * activation_bytes,
    )


def need_of(shape: ModelShape, config: TrainConfig) -> Need:
    """``estimate`` for a run's settings. Rows of ``--dataload only`` may be short and count as one token."""
    compute = _BYTES[config.runtime.precision or "fp32"]
    return estimate(
        parameters=count_parameters(shape),
        trained=count_trained(shape, config.method),
        frozen_bytes=0 if config.method.peft == "none" else compute,
        activation_bytes=compute,
        rows=config.schedule.micro_bsz,
        tokens=1 if config.data.dataload == "only" else config.data.ctx_len or 1,
        n_layer=shape.n_layer,
        n_embd=shape.n_embd,
        vocab_size=shape.vocab_size,
        checkpointing=bool(config.runtime.grad_cp),
        moment_bytes=find(OPTIMIZERS, config.optimizer.optim, flag="--optim").moment_bytes,
    )


def total_memory(device_type: str) -> int | None:
    """Bytes of the device, used or not; None where they cannot be told."""
    if device_type == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    if device_type != "cpu":
        return None
    limits = [_meminfo_total(Path("/proc/meminfo")), _cgroup_limit(Path("/sys/fs/cgroup/memory.max"))]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _meminfo_total(path: Path) -> int | None:
    if not path.is_file():
        return None
    sizes = {
        key: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in path.read_text().splitlines())
        if key in ("MemTotal", "SwapTotal")
    }
    return sum(sizes.values()) or None


def _cgroup_limit(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None


def check_memory(shape: ModelShape, config: TrainConfig) -> None:
    """Compare a run's least need with all the memory its device has.

    Raises: UserError if it cannot fit, with up to three ways out, the cheapest first.
    """
    device_type = "cuda" if config.runtime.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    if config.runtime.accelerator == "gpu" and device_type == "cpu":
        return
    refuse_if_too_large(need_of(shape, config), total_memory(device_type), config)


def refuse_if_too_large(need: Need, available: int | None, config: TrainConfig) -> None:
    """Raises: UserError if ``need`` is more than ``available`` bytes."""
    if available is None or need.total <= available:
        return
    raise UserError(
        "this run cannot fit into memory",
        found=f"{_gb(available)} GB there",
        expected=f"at least {_gb(need.total)} GB: weights {_gb(need.weights)}, gradients {_gb(need.gradients)}, "
        f"optimizer {_gb(need.optimizer)}, activations {_gb(need.activations)}, logits {_gb(need.logits)}",
        fix=", or ".join(_ways_out(need, config)[:3]) or "a smaller model",
    )


def _ways_out(need: Need, config: TrainConfig) -> list[str]:
    schedule, runtime = config.schedule, config.runtime
    ways = []
    if schedule.micro_bsz > 1:
        batches = schedule.micro_bsz * schedule.accumulate_grad_batches
        ways.append(f"--micro_bsz 1 --accumulate_grad_batches {batches}")
    if not runtime.grad_cp:
        ways.append("--grad_cp 1")
    if runtime.precision in ("fp32", "tf32") and config.method.peft != "none":
        ways.append("--precision bf16")
    if (config.data.ctx_len or 0) > _SHORT_CONTEXT:
        ways.append(f"--ctx_len {_SHORT_CONTEXT}")
    if config.method.peft == "none":
        # the weights alone are the trouble more often than what a batch needs
        at = 0 if need.gradients + need.optimizer > need.activations else len(ways)
        ways.insert(at, "--peft lora")
    return ways


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"
