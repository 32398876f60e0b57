"""Operators of our own that PyTorch takes as one call each.

Activation checkpointing, torch.compile and tensors without data then see a name with inputs and outputs instead of the
operator's inside. Autograd is the caller's: an autograd function calls one such operator in each direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

BODIES: dict[OpOverload, Callable[..., Any]] = {}
"""What operators written in PyTorch do inside, for those who want to look: it runs on any device, ``meta`` too."""


def apart(body: Callable[..., Any]) -> Callable[..., Any]:
    """``body`` on the device of its first tensor, and without autocast.

    Kernels go to the current GPU, which need not be the one that holds their tensors: PyTorch sets it for its own
    operators alone.
    """

    @wraps(body)
    def alone(*args: Any) -> Any:
        device = _device_of(args)
        if device is None:
            return body(*args)
        with ExitStack() as around:
            if device.type == "cuda":
                around.enter_context(torch.cuda.device(device))
            if torch.is_autocast_enabled(device.type):
                around.enter_context(torch.autocast(device.type, enabled=False))
            return body(*args)

    return alone


def _device_of(args: Iterable[Any]) -> torch.device | None:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
        if isinstance(arg, list | tuple) and (inside := _device_of(arg)) is not None:
            return inside
    return None


def opaque(
    name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any], *, in_pytorch: bool = False
) -> Callable[..., Any]:
    """Make ``rwkvpeft::name`` of a function, set ``apart``.

    Args:
        schema: as of ``torch.library.custom_op``; no output may share memory with an input or another output.
        body: the function.
        fake: makes outputs of the right sizes and dtypes without computing.
        in_pytorch: whether all of ``body`` is, so that it runs without data too.
    """

    made = torch.library.custom_op(f"rwkvpeft::{name}", apart(body), mutates_args=(), schema=schema)
    made.register_fake(fake)
    call: OpOverload = getattr(torch.ops.rwkvpeft, name).default
    if in_pytorch:
        BODIES[call] = body
    return call
