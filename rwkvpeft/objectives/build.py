"""The objective a run's settings ask for."""

from __future__ import annotations

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.objectives.base import Objective
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.objectives.long_context import LongContext
from rwkvpeft.ops.cross_entropy import RowChoice
from rwkvpeft.ops.cross_entropy_torch import RowProgram


def build_objective(
    config: TrainConfig, *, compact: bool, rows: RowChoice | RowProgram, chunk_rows: int | None = None
) -> Objective:
    """Make what turns a batch into a loss.

    Args:
        compact, rows, chunk_rows: as of ``LanguageModelling``.
    """
    per_token = LanguageModelling(
        config.optimizer.logit_penalty,
        chunk_rows,
        compact=compact,
        rows=rows,
        label_smoothing=config.method.label_smoothing,
        tells_lengths=config.method.neftune_alpha > 0,
    )
    long = config.long_context
    if not long.infctx:
        return per_token
    return LongContext(
        per_token,
        long.chunk_ctx,
        exact=long.infctx_grad == "exact",
        offload=long.infctx_offload,
        late=config.runtime.precision == "fp16",
    )
