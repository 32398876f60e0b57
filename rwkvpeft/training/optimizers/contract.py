"""What the table of optimizers holds: how one is built, what it needs, and what it asks of a run.

An optimizer works on groups from ``parameter_groups``; the training loop sets their learning rate and weight decay
before each step. Trained parameters are fp32 and thus their own master copy. Gradients reach the optimizer unscaled
and clipped, so that a gradient scaler (fp16) works with every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from rwkvpeft.config.groups import OptimizerConfig
from rwkvpeft.errors import UserError
from rwkvpeft.registry import OPTIMIZERS, find


class Builder(Protocol):
    """Makes an optimizer.

    ``groups`` come from ``parameter_groups``, their parameters on the device they are trained on, which ``check``
    has found good. With ``scaled_gradients`` a gradient scaler is at work. Raises UserError if it cannot train these
    parameters.
    """

    def __call__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, *, scaled_gradients: bool
    ) -> Optimizer:
        """Build it."""
        ...


class Check(Protocol):
    """Raises UserError if this machine lacks what the optimizer needs on ``device_type``."""

    def __call__(self, device_type: str) -> None:
        """Check it."""
        ...


def _nothing(device_type: str) -> None:
    return


@dataclass(frozen=True)
class OptimizerKind:
    """One line of the table.

    ``moment_bytes`` is what it certainly keeps on the device for each trained number. ``keeps_rate`` means that the
    learning rate stays at its highest after the warm-up, whatever the schedule.
    """

    build: Builder
    moment_bytes: int
    check: Check = _nothing
    keeps_rate: bool = False


def find_optimizer(name: str) -> OptimizerKind:
    """The optimizer of ``--optim``. Raises: UserError if there is none of that name."""
    kind: OptimizerKind = find(OPTIMIZERS, name, flag="--optim")
    return kind


def needed_package(package: str, *, extra: str) -> ModuleType:
    """Import an optional package. Raises: UserError with the command that installs it."""
    if find_spec(package) is None:
        raise UserError(f"this optimizer needs the package {package}", fix=f"pip install 'rwkvpeft[{extra}]'")
    return import_module(package)


class Combined(Optimizer):
    """Several optimizers as one, each with its own parameters.

    Groups and state are shared with the parts, so that whoever sets a learning rate, clips gradients, or saves and
    restores the state does it here for all of them.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:end]
            part.state = self.state
            start = end

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Let every part take its step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; the base class puts new groups and a new state in the place of the old ones."""
        super().load_state_dict(state_dict)
        self._share()
