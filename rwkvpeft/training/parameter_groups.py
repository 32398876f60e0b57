"""Which parameters learn faster, and which are pulled towards zero.

As RWKV-LM's trainers do: the decay of the time mixing (v5, v6 ``time_decay``, v7 ``w0``) learns twice as fast, and
weight decay acts on the large matrices alone, i.e. on parameters of two or more axes whose name ends in ``.weight``.
RWKV-PEFT gives v7's ``w0`` no factor and decays ``r_k`` and the low-rank matrices too; RWKV-LM's author warns against
that. Adapter tensors (``lora_A``, ``lora_B``, ``time_state``) learn at the plain rate and are not decayed: a decayed
low-rank product would be pulled towards the base model, not towards small weights. An adapter's tensors can have
rates and a weight decay of their own.

In stage 2 of RWKV-LM's pre-training the vectors of v5's and v6's time mixing (shares of the token before, decay,
bonus) learn five times as fast, to find their place before the matrices do; v7 has no such stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from rwkvpeft.adapters.base import Rates

_TWICE = (".att.w0", ".att.time_decay")
_FIVE_TIMES_IN_STAGE_2 = re.compile(r".*\.time_(mix_\w|maa_\w|decay|faaaa)")


def lr_scale(name: str, train_stage: int = 0) -> float:
    """Factor on the learning rate of the parameter ``name`` in that stage of RWKV-LM's; 0: no stage."""
    if train_stage == 2 and _FIVE_TIMES_IN_STAGE_2.fullmatch(name):
        return 5.0
    return 2.0 if name.endswith(_TWICE) else 1.0


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on the parameter. Axes of length 1 do not count."""
    return name.endswith(".weight") and sum(size > 1 for size in parameter.shape) >= 2


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    layerwise_lr: bool,
    weight_decay: float,
    train_stage: int = 0,
    rates: Callable[[str], Rates | None] | None = None,
) -> list[dict[str, Any]]:
    """Sort named parameters into optimizer groups.

    A group has ``params``, ``names``, ``lr_scale``, ``weight_decay``, ``lr_init`` and ``lr_final`` (None where they
    are the run's) and ``own_decay``, whether its weight decay is its own and stays, rather than moves with the run's.
    Frozen parameters are left out; groups and their members keep the order in which they first appear.

    Args:
        train_stage: the stage of RWKV-LM's pre-training whose factors are meant; 0: no stage.
        rates: learning rates and weight decay of a parameter that has its own, by the name it has here. Its own weight
            decay acts whatever the parameter's kind.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        own = (rates(name) if rates else None) or Rates()
        settings = {
            "lr_scale": lr_scale(name, train_stage) if layerwise_lr else 1.0,
            "weight_decay": weight_decay if weight_decay > 0 and is_decayed(name, parameter) else 0.0,
            "lr_init": own.lr_init,
            "lr_final": own.lr_final,
            "own_decay": own.weight_decay is not None,
        }
        if own.weight_decay is not None:
            settings["weight_decay"] = own.weight_decay
        group = groups.setdefault(tuple(settings.values()), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
