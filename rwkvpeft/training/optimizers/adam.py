"""Adam, PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from rwkvpeft.config.groups import OptimizerConfig
from rwkvpeft.training.optimizers.contract import OptimizerKind

# device types whose Adam runs as one kernel over all parameters
_FUSED = ("cpu", "cuda", "xpu")


def build_adam(groups: list[dict[str, Any]], config: OptimizerConfig, *, scaled_gradients: bool) -> Optimizer:
    """Adam; with decoupled decay (AdamW) as soon as a group has weight decay.

    Args:
        scaled_gradients: the fused kernel would take the unscaling upon itself, after clipping; it is not used then.
    Source: Kingma and Ba (arXiv 1412.6980), Loshchilov and Hutter (arXiv 1711.05101).
    """
    decays = any(group["weight_decay"] > 0 for group in groups)
    kind = torch.optim.AdamW if decays else torch.optim.Adam
    device = groups[0]["params"][0].device.type
    return kind(
        groups,
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=device in _FUSED and not scaled_gradients,
    )


ADAM = OptimizerKind(build_adam, moment_bytes=8)
