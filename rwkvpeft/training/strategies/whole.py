"""One device alone, or several of which each holds everything and averages its gradients with the others (DDP)."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import DDPStrategy

from rwkvpeft.training.strategies.contract import Sharing


class Whole(Sharing):
    """``--strategy auto`` and ``ddp``."""

    def strategy(self) -> Any:
        """DDP where there are several devices, or it is asked for."""
        if self.processes == 1 and self.config.runtime.strategy == "auto":
            return "auto"
        # the buffers are quantised weights, which no step changes
        return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True, broadcast_buffers=False)
