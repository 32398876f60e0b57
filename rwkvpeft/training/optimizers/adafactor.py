"""Adafactor: second moments as one row and one column per matrix, no first moments."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from rwkvpeft.config.groups import OptimizerConfig
from rwkvpeft.training.optimizers.contract import OptimizerKind

# the floor of the factor by which the rate is scaled with the size of a tensor
_SMALLEST_SIZE = 1.0


def build_adafactor(groups: list[dict[str, Any]], config: OptimizerConfig, *, scaled_gradients: bool) -> Optimizer:
    """Adafactor with Adam's learning rates.

    The paper's rate is relative to the size (RMS) of each tensor, at least 1e-3: what starts at zero, as half of an
    adapter does, would stand still. Here that least size is 1, so that ``--lr_init`` is the size of a step, as with
    Adam. In step t the rate is at most 1 / sqrt(t). ``beta1``, ``beta2`` and ``adam_eps`` play no part.

    Source: Shazeer and Stern (arXiv 1804.04235).
    """
    return torch.optim.Adafactor(groups, lr=0.0, eps=(None, _SMALLEST_SIZE), weight_decay=0.0)


ADAFACTOR = OptimizerKind(build_adafactor, moment_bytes=0)
