"""An optimizer's state by the names of the parameters, as a resume point holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def moments_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies on the CPU of the state: tensors ``optim.{parameter}.{key}``, numbers ``number.{parameter}.{key}``, and
    ``group.{index}.{key}`` for the numbers that run with a whole group."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optim.{name}.{key}"] = value.detach().cpu()
            else:
                tensors[f"number.{name}.{key}"] = exactly(value)
    for index, group in enumerate(optimizer.param_groups):
        for key in getattr(optimizer, "running_numbers", ()):
            tensors[f"group.{index}.{key}"] = exactly(group[key])
    return tensors


def exactly(number: float) -> Tensor:
    """A number as a tensor whose ``item`` is that number, of the same type."""
    return torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)


def saved_state(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What ``moments_of`` gave, by parameter and key; views of the tensors."""
    saved: dict[str, dict[str, Any]] = {}
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition(".")
        name, _, key = rest.rpartition(".")
        if kind in ("optim", "number"):
            saved.setdefault(name, {})[key] = tensor if kind == "optim" else tensor.item()
    return saved


def load_moments(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer its saved state; its parameters are those of ``model``."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    saved = saved_state(tensors)
    state = optimizer.state_dict()
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition(".")
        if kind == "group":
            index, _, key = rest.rpartition(".")
            state["param_groups"][int(index)][key] = tensor.item()
    numbered = zip(
        [number for group in state["param_groups"] for number in group["params"]],
        [parameter for group in optimizer.param_groups for parameter in group["params"]],
        strict=True,
    )
    for number, parameter in numbered:
        if names[parameter] in saved:
            state["state"][number] = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in saved[names[parameter]].items()
            }
    optimizer.load_state_dict(state)
