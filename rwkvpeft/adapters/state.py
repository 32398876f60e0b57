"""State tuning: every weight stays frozen, only what each layer starts from is learned.

Source: BlinkDL, RWKV-LM, state tuning of RWKV-6; names and orientation as RWKV-PEFT writes them:
``blocks.{i}.att.time_state`` (H, N, N), rows are value channels, columns key channels. A file holds one tensor per
layer and nothing else, which is what RWKV Runner asks of a state file. With ``token_shift`` there are also
``blocks.{i}.att.shift_state`` and ``blocks.{i}.ffn.shift_state`` (C,), what the first token takes for its predecessor;
no other program knows those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter, Rates
from rwkvpeft.adapters.settings import StateConfig
from rwkvpeft.adapters.targets import device_of
from rwkvpeft.errors import UserError

BESIDE_OTHERS = {"lr_init": 1.0, "lr_final": 0.01}
"""What a state learns at where the run's own rates are those of another method."""

_NAME = re.compile(r"^blocks\.\d+\.(att\.time_state|(att|ffn|ffnPre)\.shift_state)$")


class StateAdapter(Adapter):
    """A trained start in every layer, zero at first, or what the base already has."""

    name: ClassVar[str] = "state"
    Config = StateConfig
    config: StateConfig

    def __init__(self, config: StateConfig | None = None, train_parts: Iterable[str] = ()) -> None:
        """``train_parts`` is ignored: a state file may hold nothing but states."""
        super().__init__(config)
        self._before: dict[str, nn.Parameter | None] = {}
        self._trained: dict[str, nn.Parameter | None] = {}

    def insert(self, model: nn.Module) -> None:
        """Give each layer a start that is trained."""
        shape: Any = model.shape
        heads, size = shape.dim_att // shape.head_size, shape.head_size
        device = device_of(model)
        for layer in self.layers(shape.n_layer):
            has_memory = layer in shape.time_mixing_layers
            if has_memory:
                self._start(model, f"blocks.{layer}.att.time_state", torch.zeros(heads, size, size, device=device))
            if self.config.token_shift:
                for part in ("att" if has_memory else "ffnPre", "ffn"):
                    self._start(model, f"blocks.{layer}.{part}.shift_state", torch.zeros(shape.n_embd, device=device))

    def layers(self, n_layer: int) -> list[int]:
        """The layers whose start is trained: all of them."""
        return list(range(n_layer))

    def _start(self, model: nn.Module, name: str, zeros: Tensor) -> None:
        before = _get(model, name)
        self._before[name] = before
        _set(model, name, nn.Parameter((zeros if before is None else before.detach()).to(torch.float32, copy=True)))

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The starts in layer order."""
        return {name: model.get_parameter(name) for name in self._before}

    def switch(self, model: nn.Module, *, on: bool) -> None:
        """Start from what was learned, or from what the base had."""
        if not on:
            self._trained = {name: _get(model, name) for name in self._before}
        for name, start in (self._trained if on else self._before).items():
            _set(model, name, start)

    def rates(self, name: str) -> Rates | None:
        """The states' own learning rates."""
        if not _NAME.match(name):
            return None
        return Rates(self.config.lr_init, self.config.lr_final, 0.0)

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """A file of nothing but states."""
        return all(_NAME.match(name) for name in tensors)

    def file_settings(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Whether the file has token-shift states."""
        shifts = any(name.endswith(".shift_state") for name in tensors)
        return {**self.settings(), "token_shift": shifts}

    def is_addition(self, name: str) -> bool:
        """A state joins the base's tensors under its own name."""
        return bool(_NAME.match(name))


def _get(model: nn.Module, name: str) -> nn.Parameter | None:
    path, _, attribute = name.rpartition(".")
    found: nn.Parameter | None = getattr(model.get_submodule(path), attribute)
    return found


def _set(model: nn.Module, name: str, start: nn.Parameter | None) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, start)


def check_states(
    tensors: Mapping[str, Tensor],
    *,
    n_layer: int,
    dim_att: int,
    head_size: int | None = None,
    every_layer: bool = True,
    pre_ffn: int = 0,
) -> None:
    """Compare a file's ``time_state`` tensors with the sizes of a model.

    Args:
        head_size: None if it is not known.
        every_layer: whether each layer must have a state, as all but a layer profile give it one.
        pre_ffn: 1 if block 0 has no time mixing, and with it no state.
    Raises: UserError if a layer has no state or is none of the model's, or if a state's heads do not make up the width
        of the time mixing.
    """
    found = [name for name in tensors if name.endswith(".time_state")]
    expected = {f"blocks.{i}.att.time_state" for i in range(pre_ffn, n_layer)}
    if not expected.issuperset(found) or (every_layer and len(found) < len(expected)):
        raise UserError(
            "the state file does not fit the base model",
            found=f"{len(found)} tensors",
            expected=f"one time_state for each of {len(expected)} layers",
        )
    for name in found:
        tensor = tensors[name]
        size = head_size or tensor.shape[-1]
        if tensor.shape != (dim_att // size, size, size):
            raise UserError(
                f"{name} does not fit the base model",
                found=str(tuple(tensor.shape)),
                expected=str((dim_att // size, size, size)),
            )
