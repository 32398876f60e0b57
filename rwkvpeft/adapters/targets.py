"""Which linears of a model an adapter goes on, and how one module is put in another's place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rwkvpeft.errors import ContractError, UserError

DEFAULT_TARGETS = ("receptance", "key", "value", "output", "gate")
"""The large linears of the time mixing and the channel mixing, by the last part of their path."""


def target_paths(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """Paths of the linears to adapt, in the model's order.

    Args:
        wanted: ends of paths; None means ``DEFAULT_TARGETS`` in every block. The head is meant only by its full name.
    Raises: UserError if a wanted name fits no linear of this model.
    """
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    in_blocks = [path for path in linears if path.startswith("blocks.")]
    chosen = [path for path in linears if any(fits(path, target) for target in wanted or DEFAULT_TARGETS)]
    unmatched = [target for target in wanted or () if not any(fits(path, target) for path in linears)]
    if unmatched or not chosen:
        offered = sorted({".".join(path.split(".")[2:]) for path in in_blocks} | {"head"} & set(linears))
        raise UserError("target_modules names no linear of this model", found=few(unmatched), expected=offered)
    return chosen


def fits(path: str, target: str) -> bool:
    """Whether a wanted name means the linear at ``path``."""
    return path == target or (path.startswith("blocks.") and path.endswith("." + target))


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule at the dotted ``path``."""
    parent_path, _, last = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if last not in dict(parent.named_children()):
        raise ContractError(f"no submodule at {path}")
    setattr(parent, last, new)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters or, if it has none, its buffers are."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def few(items: Sequence[str], limit: int = 3) -> str:
    """The first items and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
