"""Operators of our own that PyTorch takes as one call each.

Activation checkpointing, torch.compile and tensors without data then see a name with inputs and outputs instead of the
operator's inside. Autograd is the caller's: an autograd function calls one such operator in each direction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

BODIES: dict[OpOverload, Callable[..., Any]] = {}
"""What operators written in PyTorch do inside, for those who want to look: it runs on any device, ``meta`` too."""


def opaque(
    name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any], *, in_pytorch: bool = False
) -> Callable[..., Any]:
    """Make ``rwkvpeft::name`` of a function.

    Under autocast it computes as without.

    Args:
        schema: as of ``torch.library.custom_op``; no output may share memory with an input or another output.
        body: the function; its first tensor tells the device.
        fake: makes outputs of the right sizes and dtypes without computing.
        in_pytorch: whether all of ``body`` is, so that it runs without data too.
    """

    @wraps(body)
    def apart(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if not torch.is_autocast_enabled(device.type):
            return body(*args)
        with torch.autocast(device.type, enabled=False):
            return body(*args)

    made = torch.library.custom_op(f"rwkvpeft::{name}", apart, mutates_args=(), schema=schema)
    made.register_fake(fake)
    call: OpOverload = getattr(torch.ops.rwkvpeft, name).default
    if in_pytorch:
        BODIES[call] = body
    return call
