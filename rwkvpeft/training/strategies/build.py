"""From ``--strategy`` to what does it."""

from __future__ import annotations

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.registry import STRATEGIES, find
from rwkvpeft.training.strategies.contract import Sharing


def build_sharing(config: TrainConfig) -> Sharing:
    """The strategy of a run. Raises: UserError as ``Sharing``, and for an unknown name."""
    kind: type[Sharing] = find(STRATEGIES, config.runtime.strategy, flag="--strategy")
    return kind(config)
