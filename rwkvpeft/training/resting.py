"""A model that is looked at while it trains."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def at_rest(model: nn.Module, seed: int) -> Generator[None, None, None]:
    """Inside the block the model does not train: nothing drops out, and what is drawn is not taken from the run."""
    trains = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, trained in trains:
                module.training = trained
