"""What rows that are worked through in chunks leave in memory between them."""

from __future__ import annotations

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.memory.outline import DTYPES
from rwkvpeft.models.shape import ModelShape


def bytes_of_states(shape: ModelShape, config: TrainConfig, *, beyond: int) -> int:
    """States that exact gradients keep on the device, but for those of a row's first ``beyond`` chunks."""
    long = config.long_context
    waits_elsewhere = long.infctx_offload and config.runtime.accelerator != "cpu"
    if not long.infctx or long.infctx_grad != "exact" or waits_elsewhere:
        return 0
    chunks = -(-(config.data.ctx_len or 1) // long.chunk_ctx)
    activation = DTYPES[config.runtime.precision or "fp32"].itemsize
    # the two last normed inputs, and a memory of fp32
    of_a_layer = 2 * shape.n_embd * activation + shape.dim_att * shape.head_size * 4
    return max(0, chunks - beyond) * config.schedule.micro_bsz * shape.n_layer * of_a_layer
