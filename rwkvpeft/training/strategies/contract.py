"""What the rest of training asks of a strategy, and the answers of one whose processes hold everything whole.

Nothing else in this package knows which strategy runs: callbacks save, evaluate and take steps through these methods.
"Collective" ones must be called by all processes, in the same order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.training.devices import find_device
from rwkvpeft.training.optimizers.moments import load_moments, moments_of
from rwkvpeft.training.precision import ScaledGradients, SoundSteps


class Sharing(ABC):
    """One value of ``--strategy``.

    Args:
        config: resolved settings.
    Raises: UserError if the machine, the installation or the other settings do not suit it.
    """

    splits_weights = False
    """Whether a process holds a part of the weights only: then all processes must run the model together."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device_type = find_device(config.runtime)

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.config.runtime.devices * self.config.runtime.num_nodes

    def trainer_arguments(self) -> dict[str, Any]:
        """The part of Lightning's ``Trainer`` arguments that depends on machine and strategy."""
        runtime = self.config.runtime
        return {
            "accelerator": "cpu" if self.device_type == "cpu" else "gpu",
            "devices": runtime.devices,
            "num_nodes": runtime.num_nodes,
            "strategy": self.strategy(),
            "plugins": [self.precision()],
        }

    @abstractmethod
    def strategy(self) -> Any:
        """Lightning's strategy."""

    def precision(self) -> Any:
        """Lightning's precision plugin."""
        return ScaledGradients(self.device_type) if self.config.runtime.precision == "fp16" else SoundSteps()

    def gradient_norm(self, trained: list[nn.Parameter], largest: float) -> Tensor | None:
        """The norm () of all gradients together, before they are clipped to ``largest``, which is done; None if only
        the step itself tells it (``norm_of_step``). Gradients that are not finite stay as they are, for a diagnosis.
        Collective."""
        if not hasattr(torch.nn.utils, "get_total_norm"):
            # before PyTorch 2.6
            return torch.nn.utils.clip_grad_norm_(trained, largest)
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in trained if weight.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(trained, largest, norm.where(norm.isfinite(), 0.0))
        return norm

    def norm_of_step(self, trainer: pl.Trainer) -> float:
        """The norm of the gradients of the step just taken, where ``gradient_norm`` does not tell; inf if it was left
        out."""
        return math.nan

    def part(self, tensor: Tensor) -> Tensor:
        """What this process holds of a weight or its gradient."""
        return tensor

    def run(self, trainer: pl.Trainer, work: Callable[[], Any]) -> Any:
        """Do ``work``, which runs the model outside of a training step. Collective where weights are split."""
        return work()

    @contextmanager
    def whole(self, model: nn.Module, *, here: bool, frozen_too: bool = False) -> Generator[None, None, None]:
        """Inside the block the trained parameters of ``model`` are whole. Collective.

        Args:
            here: whether this process wants them; on others they may be anything.
            frozen_too: all other parameters are wanted as well.
        """
        yield

    def moments(self, model: nn.Module, optimizer: Optimizer, *, here: bool) -> dict[str, Tensor]:
        """The optimizer's state, whole, on the CPU: tensors ``optim.{parameter}.{key}``, numbers
        ``number.{parameter}.{key}`` and ``group.{index}.{key}``. The same for every strategy. Collective.

        Args:
            here: whether this process wants them.
        """
        return moments_of(model, optimizer) if here else {}

    def load_moments(self, model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Give the optimizer the state that ``moments`` of any strategy saved."""
        load_moments(model, optimizer, tensors)

    def step_ends(self, trainer: pl.Trainer, ends: bool) -> None:
        """Learn, before a micro-batch, whether the optimizer's step follows it."""
        del trainer, ends


@contextmanager
def swapped(model: nn.Module, parameters: Mapping[str, Tensor]) -> Generator[None, None, None]:
    """Inside the block these tensors stand in for the parameters of ``model`` of those names."""
    places = [(*_place(model, name), tensor) for name, tensor in parameters.items()]
    before = [module._parameters[name] for module, name, _ in places]
    try:
        for (module, name, tensor), parameter in zip(places, before, strict=True):
            trained = parameter is not None and parameter.requires_grad
            module._parameters[name] = nn.Parameter(tensor, requires_grad=trained)
        yield
    finally:
        for (module, name, _), parameter in zip(places, before, strict=True):
            module._parameters[name] = parameter


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def trained_parameters(model: nn.Module, *, frozen_too: bool = False) -> Iterable[tuple[str, nn.Parameter]]:
    """What requires a gradient, by name; ``frozen_too``: and what does not."""
    named = model.named_parameters()
    return ((name, parameter) for name, parameter in named if frozen_too or parameter.requires_grad)
