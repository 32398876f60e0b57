"""Base parameters that are trained in full beside an adapter: ``--train_parts``.

``ln`` is every norm (ln0, ln1, ln2, ln_x, ln_out), ``emb`` and ``head`` the two tables. ``time`` follows RWKV-PEFT,
which selects every name with ``time`` in it: token-shift mixes, decay, bonus and their low-rank matrices in v5 and
v6. In v7 no published name holds that word; there it is the parameters that took those roles and the rest of what
steers v7's memory. v7's gate g1, g2 is left out, as the gate of v5 and v6 (a linear) is not part of ``time``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rwkvpeft.errors import UserError

PARTS: dict[str, str] = {
    "time": r"\.(time_(?!state)\w+|x_[rwkvag]|[wav][012]|k_[ka]|r_k)$",
    "ln": r"(^|\.)ln(\d|_x|_out)\.",
    "emb": r"^emb\.weight$",
    "head": r"^head\.weight$",
}
"""Part: pattern of its parameter names."""

UNREAD = re.compile(r"^blocks\.0\.att\.v[012]$")
"""Parameters that v7 has and never reads."""


class TrainedParts:
    """The chosen parts of one model.

    Args:
        parts: names from ``PARTS``; ``none`` or nothing for none at all.
    Raises: UserError for an unknown name.
    """

    def __init__(self, parts: Iterable[str] = ()) -> None:
        self.names = [part for part in parts if part and part != "none"]
        if unknown := [part for part in self.names if part not in PARTS]:
            raise UserError("--train_parts has an unknown part", found=unknown, expected=[*PARTS, "none"])
        self._patterns = [re.compile(PARTS[part]) for part in self.names]
        self._frozen: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}

    def includes(self, name: str) -> bool:
        """Whether the base parameter ``name`` is trained. Layer 0 of v7 has v0, v1, v2 but never reads them."""
        return not UNREAD.match(name) and any(pattern.search(name) for pattern in self._patterns)

    def attach(self, model: nn.Module, exclude: Collection[str] = ()) -> None:
        """Make the chosen parameters fp32 and trainable; their frozen values are kept for ``restored``.

        Raises: UserError if a part selects nothing.
        """
        chosen = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name not in exclude and self.includes(name)
        }
        self.check(chosen)
        for name, parameter in chosen.items():
            self._frozen[name] = parameter.detach()
            # a copy even where the base is fp32 already: the frozen values may be a read-only memory map
            parameter.data = parameter.detach().to(torch.float32, copy=True)
            parameter.requires_grad_(True)

    def check(self, chosen: Collection[str]) -> None:
        """Look for parts without a parameter among the ``chosen``.

        Raises: UserError for the first one.
        """
        for part, pattern in zip(self.names, self._patterns, strict=True):
            if not any(pattern.search(name) for name in chosen):
                wrapped = part == "head" and "an adapter is on the head already"
                raise UserError(f"--train_parts {part} selects no parameter of this model", found=wrapped or None)

    def tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: model.get_parameter(name) for name in self._frozen}

    def show(self, model: nn.Module, *, trained: bool) -> None:
        """Give the chosen parameters their trained values, or those from before training."""
        if trained:
            for name, values in self._trained.items():
                model.get_parameter(name).data = values
            self._trained = {}
        elif not self._trained:
            self._trained = {name: parameter.data for name, parameter in self.tensors(model).items()}
            for name, values in self._trained.items():
                model.get_parameter(name).data = self._frozen[name].to(values.device)

    @contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the chosen parameters have their values from before training."""
        self.show(model, trained=False)
        try:
            yield
        finally:
            self.show(model, trained=True)
