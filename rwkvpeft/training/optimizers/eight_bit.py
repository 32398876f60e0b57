"""bitsandbytes' optimizers: moments in 8 bits, moments in memory that may leave the GPU, and Lion.

8-bit moments are quantised in blocks of 256 with a scale each; tensors of less than 4,096 numbers keep theirs in 32
bits. Paged moments lie in CUDA's managed memory, which the driver moves to the host when the GPU is full. Adam and
AdamW are the same program: the decay is decoupled in both.

Source: Dettmers et al., 8-bit Optimizers (arXiv 2110.02861) and QLoRA (arXiv 2305.14314); Chen et al., Lion
(arXiv 2302.06675).
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from rwkvpeft.config.groups import OptimizerConfig
from rwkvpeft.errors import UserError
from rwkvpeft.quantization.library import without_remarks
from rwkvpeft.training.optimizers.contract import OptimizerKind, needed_package

_DEVICES = ("cpu", "cuda", "xpu")
_FIRST_ON_CPU = (0, 50)


def bitsandbytes() -> ModuleType:
    """The package. Raises: UserError if it is missing."""
    with without_remarks():
        return needed_package("bitsandbytes", extra="bnb")


def _check(device_type: str, *, paged: str = "") -> None:
    """Raises: UserError if the package is missing, too old, or has no program for the device.

    ``paged`` is the name of a paged one.
    """
    if paged and device_type != "cuda":
        raise UserError(
            f"--optim {paged} needs an NVIDIA GPU, whose memory its moments can leave",
            found=device_type,
            fix=f"--optim {paged.removeprefix('paged_')}",
        )
    if device_type not in _DEVICES:
        raise UserError(f"bitsandbytes has no optimizer for {device_type}", expected=_DEVICES, fix="--optim adam")
    version = bitsandbytes().__version__
    if device_type == "cpu" and tuple(map(int, version.split(".")[:2])) < _FIRST_ON_CPU:
        raise UserError(
            "this bitsandbytes has optimizers for GPUs alone",
            found=version,
            expected=".".join(map(str, _FIRST_ON_CPU)),
            fix="pip install -U bitsandbytes, or --optim adam",
        )


def _build(
    groups: list[dict[str, Any]], config: OptimizerConfig, *, scaled_gradients: bool, name: str, paged: bool
) -> Optimizer:
    """The package's optimizer ``name`` over ``groups``."""
    kind = getattr(bitsandbytes().optim, name)
    numbers: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2), "weight_decay": 0.0}
    if "Lion" not in name:
        numbers["eps"] = config.adam_eps
    optimizer: Optimizer = (paged_class(kind) if paged else kind)(groups, **numbers)
    return optimizer


def paged_class(kind: Any) -> Any:
    """``kind``, but its saved moments come back into paged memory: the package would put them on the GPU."""

    class Paged(kind):
        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            super().load_state_dict(state_dict, move_to_device=False)
            saved = dict(self.state)
            self.state.clear()
            for group_number, group in enumerate(self.param_groups):
                for number, parameter in enumerate(group["params"]):
                    if saved.get(parameter):
                        self.init_state(group, parameter, group_number, number)
            if torch.cuda.is_available():
                # the GPU is still filling with zeros what the host is about to write
                torch.cuda.synchronize()
            for parameter, state in self.state.items():
                for key, value in saved[parameter].items():
                    if isinstance(value, torch.Tensor):
                        state[key].copy_(value)
                    else:
                        state[key] = value

    return Paged


def _kind(name: str, moment_bytes: int, paged: str = "") -> OptimizerKind:
    return OptimizerKind(
        partial(_build, name=name, paged=bool(paged)),
        # paged moments may all have left
        0 if paged else moment_bytes,
        partial(_check, paged=paged),
    )


ADAM_8BIT = _kind("Adam8bit", 2)
ADAMW_8BIT = _kind("AdamW8bit", 2)
PAGED_ADAM = _kind("PagedAdam", 8, "paged_adam")
PAGED_ADAMW = _kind("PagedAdamW", 8, "paged_adamw")
PAGED_ADAM_8BIT = _kind("PagedAdam8bit", 2, "paged_adam8bit")
PAGED_ADAMW_8BIT = _kind("PagedAdamW8bit", 2, "paged_adamw8bit")
LION = _kind("Lion", 4)
LION_8BIT = _kind("Lion8bit", 1)
