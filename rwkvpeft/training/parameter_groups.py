"""Which parameters learn faster, and which are pulled towards zero.

As RWKV-LM's trainers do: the decay of the time mixing (v5, v6 ``time_decay``, v7 ``w0``) learns twice as fast, and
weight decay acts on the large matrices alone, i.e. on parameters of two or more axes whose name ends in ``.weight``.
RWKV-PEFT gives v7's ``w0`` no factor and decays ``r_k`` and the low-rank matrices too; RWKV-LM's author warns against
that. Adapter tensors (``lora_A``, ``lora_B``, ``time_state``) learn at the plain rate and are not decayed: a decayed
low-rank product would be pulled towards the base model, not towards small weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_TWICE = (".att.w0", ".att.time_decay")


def lr_scale(name: str) -> float:
    """Factor on the learning rate of the parameter ``name``."""
    return 2.0 if name.endswith(_TWICE) else 1.0


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on the parameter. Axes of length 1 do not count."""
    return name.endswith(".weight") and sum(size > 1 for size in parameter.shape) >= 2


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, layerwise_lr: bool, weight_decay: float
) -> list[dict[str, Any]]:
    """Sort named parameters into optimizer groups with ``params``, ``names``, ``lr_scale`` and ``weight_decay``.

    Frozen parameters are left out; groups and their members keep the order in which they first appear.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        scale = lr_scale(name) if layerwise_lr else 1.0
        decay = weight_decay if weight_decay > 0 and is_decayed(name, parameter) else 0.0
        group = groups.setdefault(
            (scale, decay), {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
