"""The objective a run's settings ask for."""

from __future__ import annotations

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.objectives.base import Objective
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.ops.cross_entropy import RowChoice
from rwkvpeft.ops.cross_entropy_torch import RowProgram


def build_objective(config: TrainConfig, *, compact: bool, rows: RowChoice | RowProgram) -> Objective:
    """Make what turns a batch into a loss.

    Args:
        compact, rows: as of ``LanguageModelling``.
    """
    return LanguageModelling(
        config.optimizer.logit_penalty,
        compact=compact,
        rows=rows,
        label_smoothing=config.method.label_smoothing,
        tells_lengths=config.method.neftune_alpha > 0,
    )
