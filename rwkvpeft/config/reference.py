"""What a preference objective compares with."""

from __future__ import annotations

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.objective import WITH_REFERENCE

SPLITS_WEIGHTS = ("fsdp", "deepspeed_stage_3", "deepspeed_stage_3_offload")
"""Strategies under which no process has all weights."""


def compares_with_start(config: TrainConfig) -> bool:
    """Whether a run compares with the model as training finds it, whose words are worked out once.

    A new adapter changes nothing at first, so that the base is that model and the adapter can be switched off in each
    step instead; but not where weights are split, and not where there is no adapter or it has learned something before.
    """
    if config.objective.objective not in WITH_REFERENCE or config.objective.reference == "base":
        return False
    method = config.method
    full = method.peft == "none" and not method.layer_profile
    chosen = config.objective.reference == "start"
    return chosen or full or bool(method.adapter) or config.runtime.strategy in SPLITS_WEIGHTS
