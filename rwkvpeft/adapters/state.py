"""State tuning: every weight stays frozen, only each layer's initial memory is learned.

Source: BlinkDL, RWKV-LM, state tuning of RWKV-6; names and orientation as RWKV-PEFT writes them:
``blocks.{i}.att.time_state`` (H, N, N), rows are value channels, columns key channels. A file holds one tensor per
layer and nothing else, which is what RWKV Runner asks of a state file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.errors import UserError

_NAME = re.compile(r"^blocks\.\d+\.att\.time_state$")


@dataclass(frozen=True)
class StateConfig:
    """State tuning has no settings."""


class StateAdapter(Adapter):
    """A trained initial memory in every layer, zero at first, or what the base already has."""

    name: ClassVar[str] = "state"
    Config = StateConfig
    config: StateConfig

    def __init__(self, config: StateConfig | None = None, train_parts: Iterable[str] = ()) -> None:
        """``train_parts`` is ignored: a state file may hold nothing but states."""
        super().__init__(config)
        self._before: list[nn.Parameter | None] = []
        self._trained: list[nn.Parameter | None] = []

    def _insert(self, model: nn.Module) -> None:
        shape: Any = model.shape
        heads, size = shape.dim_att // shape.head_size, shape.head_size
        for block in _blocks(model):
            before: nn.Parameter | None = block.att.time_state
            self._before.append(before)
            device = block.att.output.weight.device
            memory = torch.zeros(heads, size, size, device=device) if before is None else before.detach()
            block.att.time_state = nn.Parameter(memory.to(torch.float32, copy=True))

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """``blocks.{i}.att.time_state`` in layer order."""
        return {f"blocks.{i}.att.time_state": block.att.time_state for i, block in enumerate(_blocks(model))}

    def _switch(self, model: nn.Module, *, on: bool) -> None:
        if not on:
            self._trained = [block.att.time_state for block in _blocks(model)]
        for block, memory in zip(_blocks(model), self._trained if on else self._before, strict=True):
            block.att.time_state = memory

    def is_addition(self, name: str) -> bool:
        """A state joins the base's tensors under its own name."""
        return bool(_NAME.match(name))

    def merge(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Nothing of the base changes."""
        return None


def check_states(
    tensors: Mapping[str, Tensor], *, n_layer: int, dim_att: int, head_size: int | None = None
) -> None:
    """Compare a state file with the sizes of a model; ``head_size`` None means that it is not known.

    Raises: UserError if a layer has no state, or its heads do not make up the width of the time mixing.
    """
    expected = [f"blocks.{i}.att.time_state" for i in range(n_layer)]
    if sorted(tensors) != sorted(expected):
        raise UserError(
            "the state file does not fit the base model",
            found=f"{len(tensors)} tensors",
            expected=f"one time_state for each of {n_layer} layers",
        )
    for name, tensor in tensors.items():
        size = head_size or tensor.shape[-1]
        if tensor.shape != (dim_att // size, size, size):
            raise UserError(
                f"{name} does not fit the base model",
                found=str(tuple(tensor.shape)),
                expected=str((dim_att // size, size, size)),
            )


def _blocks(model: nn.Module) -> Iterable[Any]:
    blocks: Iterable[Any] = model.blocks  # type: ignore[assignment]
    return blocks
