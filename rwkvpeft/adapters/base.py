"""What every adapter offers: it puts trained parameters on top of a frozen model and knows how they merge.

An adapter never learns how the frozen weights are stored: it wraps modules that have a ``forward``, and merging
works on plain tensors by their checkpoint names.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkvpeft.adapters.trained_parts import TrainedParts
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.registry import ADAPTERS, find


class Adapter(ABC):
    """One method of fine-tuning. One object serves one model.

    Args:
        config: the method's settings, an instance of ``Config``.
        train_parts: base parameters trained beside the adapter: time, ln, emb, head.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spellings of settings, as alias: field."""

    def __init__(self, config: Any = None, train_parts: Iterable[str] = ()) -> None:
        self.config = self.Config() if config is None else config
        self.parts = TrainedParts(train_parts)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], train_parts: Iterable[str] = ()) -> Adapter:
        """Build the adapter from what a user wrote in ``--peft_config``.

        Raises: UserError for a key this method does not have, or a value it cannot take.
        """
        return cls(read_settings(cls.Config, settings, cls.aliases, method=cls.name), train_parts)

    def settings(self) -> dict[str, Any]:
        """All settings as plain values, defaults included; ``from_settings`` takes them back."""
        return asdict(self.config)

    def attach(self, model: nn.Module) -> None:
        """Freeze the model, add the adapter's parameters (fp32) and make the trained parts trainable (fp32).

        Raises: UserError if the model lacks what the settings ask for.
        """
        model.requires_grad_(False)
        self._insert(model)
        self.parts.attach(model, exclude=set(self.own_tensors(model)))

    @abstractmethod
    def _insert(self, model: nn.Module) -> None:
        """Add the parameters."""

    @abstractmethod
    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters this adapter added to ``model``, by their names in files."""

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Every trained parameter by its name in files: the adapter's own and the trained parts of the base."""
        return {**self.own_tensors(model), **self.parts.tensors(model)}

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copy an adapter file's tensors into the attached model.

        Raises: UserError if a tensor is missing, unexpected or of another shape.
        """
        parameters = self.trained_tensors(model)
        check_tensors(parameters, tensors)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model computes what it did before ``attach``, trained parts included."""
        self._switch(model, on=False)
        with self.parts.restored(model):
            try:
                yield
            finally:
                self._switch(model, on=True)

    @abstractmethod
    def _switch(self, model: nn.Module, *, on: bool) -> None:
        """Turn the adapter's own effect off or on again."""

    def sources(self, name: str) -> tuple[str, ...]:
        """Names of the adapter's tensors that change the base's tensor ``name``, whether or not a file has them."""
        return ()

    def merge(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The base's tensor ``name`` with the adapter folded in, in the base's dtype; None if nothing changes it.

        Computed in fp32 and rounded once.
        """
        return None

    def is_addition(self, name: str) -> bool:
        """Whether merging adds the adapter's tensor ``name`` to the checkpoint as it is."""
        return False


def build_adapter(method: str, settings: Mapping[str, Any], train_parts: Iterable[str] = ()) -> Adapter | None:
    """The adapter named by ``--peft``; None for ``none``, full training.

    Raises: UserError if the method, a setting or a part is unknown.
    """
    if method == "none":
        if settings:
            raise UserError("--peft_config has no effect without an adapter", found=sorted(settings), fix="--peft lora")
        return None
    adapter: Adapter = find(ADAPTERS, method, flag="--peft").from_settings(settings, train_parts)
    return adapter


def read_settings(config: type, settings: Mapping[str, Any], aliases: Mapping[str, str], *, method: str) -> Any:
    """Make the dataclass ``config`` from a user's dict.

    Raises: UserError for unknown keys, and for a setting given twice under two names.
    """
    known = [field.name for field in fields(config)]
    values: dict[str, Any] = {}
    for key, value in settings.items():
        name = aliases.get(key, key)
        if name not in known:
            near = difflib.get_close_matches(key, [*known, *aliases], n=1)
            raise UserError(
                f"--peft_config has a key that {method} does not know",
                found=key,
                expected=known,
                fix=f"write {near[0]}" if near else None,
            )
        if name in values:
            raise UserError(f"--peft_config gives {name} twice", found=[key, name], fix="keep one of the two")
        values[name] = value
    return config(**values)


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises: UserError that lists the first few differences of each kind.
    """
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing: {few(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        problems.append(f"unexpected: {few(unexpected)}")
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if shapes:
        problems.append(f"wrong shape: {few(shapes)}")
    if problems:
        raise UserError(
            "the adapter does not fit the model and settings",
            found="; ".join(problems),
            expected=f"{len(expected)} tensors of this model's sizes",
            fix="use the base model and the settings the adapter was trained with",
        )


def few(items: list[str], limit: int = 3) -> str:
    """The first items and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule at the dotted ``path``."""
    parent_path, _, last = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if last not in dict(parent.named_children()):
        raise ContractError(f"no submodule at {path}")
    setattr(parent, last, new)
