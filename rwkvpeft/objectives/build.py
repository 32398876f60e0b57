"""The objective a run's settings ask for."""

from __future__ import annotations

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.objectives.base import Objective, Provided
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.objectives.long_context import in_chunks
from rwkvpeft.registry import OBJECTIVES, find


def build_objective(config: TrainConfig, provided: Provided) -> Objective:
    """Make what turns a batch into a loss."""
    kind = find(OBJECTIVES, config.objective.objective, flag="--objective")
    objective: Objective = kind.build(config, provided)
    return objective


def stand_in_objective(config: TrainConfig, provided: Provided) -> Objective:
    """What takes about as much memory for a row of tokens as the objective itself, and needs nothing but the tokens."""
    return in_chunks(LanguageModelling.build_part(config, provided), config)
