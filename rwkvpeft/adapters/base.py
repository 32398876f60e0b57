"""What every adapter offers: it puts trained parameters on top of a frozen model and knows how they merge.

An adapter never learns how the frozen weights are stored: it wraps linears that have ``forward`` and
``dequantized()``, and merging works on plain tensors by their checkpoint names.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rwkvpeft.adapters.targets import few
from rwkvpeft.adapters.trained_parts import TrainedParts
from rwkvpeft.errors import UserError


class Rates(NamedTuple):
    """What the optimizer does with one trained tensor; None means what the run does with all others."""

    lr_init: float | None = None
    lr_final: float | None = None
    weight_decay: float | None = None


class Adapter(ABC):
    """One method of fine-tuning. One object serves one model.

    A run calls ``take_constants`` (if it starts from a file), ``prepare`` for each large linear while the base is
    read, ``attach``, ``load`` (if it starts from a file); then it trains and writes ``file_tensors``.

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
        self._is_off = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], train_parts: Iterable[str] = ()) -> Adapter:
        """Build the adapter from what a user wrote in ``--peft_config``.

        Raises: UserError for a key this method does not have, or a value it cannot take.
        """
        return cls(read_settings(cls.Config, settings, cls.aliases, method=cls.name), train_parts)

    def settings(self) -> dict[str, Any]:
        """All settings as plain values, defaults included; ``from_settings`` takes them back."""
        return asdict(self.config)

    # what happens before and while the base is read

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a file without a recipe can only be of this method."""
        return False

    def file_settings(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The settings, completed by what a file's tensors tell: targets and rank.

        Raises: UserError if the file's tensors cannot belong to one set of settings.
        """
        return self.settings()

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under our names, where other programs spell them differently."""
        return dict(tensors)

    def take_constants(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep what of a file's tensors is not trained but belongs to the method; returns the others."""
        return dict(tensors)

    def prepare(self, path: str, weight: Tensor) -> Tensor:
        """The frozen weight this method wants at the linear ``path`` in place of the base's ``weight`` (out, in)."""
        return weight

    def trains(self, name: str) -> bool:
        """Whether the base's own tensor ``name`` is trained: such a tensor is not quantised."""
        return self.parts.includes(name)

    # on the model

    def attach(self, model: nn.Module) -> None:
        """Freeze the model, add the adapter's parameters (fp32) and make the trained parts trainable (fp32).

        Raises: UserError if the model lacks what the settings ask for.
        """
        model.requires_grad_(False)
        self.insert(model)
        self.attach_parts(model, exclude=set(self.own_tensors(model)))

    @abstractmethod
    def insert(self, model: nn.Module) -> None:
        """Add the parameters to a frozen model."""

    def attach_parts(self, model: nn.Module, exclude: set[str]) -> None:
        """Make the chosen parameters of the base trainable, those named in ``exclude`` apart."""
        self.parts.attach(model, exclude=exclude)

    @abstractmethod
    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters this adapter added to ``model``, by their names in files."""

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Every trained parameter by its name in files: the adapter's own and the trained parts of the base."""
        return {**self.own_tensors(model), **self.parts.tensors(model)}

    def constants(self, model: nn.Module) -> dict[str, Tensor]:
        """Tensors that are not trained but that merging and going on cannot do without, by their names in files."""
        return {}

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What an adapter file holds: trained tensors and constants."""
        return {**self.trained_tensors(model), **self.constants(model)}

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copy the trained tensors of an adapter file into the attached model.

        Raises: UserError if a tensor is missing, unexpected or of another shape.
        """
        parameters = self.trained_tensors(model)
        check_tensors(parameters, tensors)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def rates(self, name: str) -> Rates | None:
        """The learning rates and weight decay of the trained tensor ``name``, if it has its own."""
        return None

    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Called after each optimizer step, while the gradients are still there; ``step`` counts from 1."""
        return

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model computes what it did before ``attach``, trained parts included. Blocks nest."""
        if self._is_off:
            yield
            return
        self._is_off = True
        self.switch(model, on=False)
        with self.parts.restored(model):
            try:
                yield
            finally:
                self.switch(model, on=True)
                self._is_off = False

    @abstractmethod
    def switch(self, model: nn.Module, *, on: bool) -> None:
        """Turn the adapter's own effect off or on again."""

    # without a model

    def sources(self, name: str) -> tuple[str, ...]:
        """Names of the adapter's tensors that change the base's tensor ``name``, whether or not a file has them."""
        return ()

    def changes(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> bool:
        """Whether merging changes the base's tensor ``name`` of that shape.

        Raises: UserError if the adapter's tensors do not fit it.
        """
        return any(source in tensors for source in self.sources(name))

    def merge(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The base's tensor ``name`` with the adapter folded in, in fp32; None if nothing changes it.

        Args:
            base: fp32, what ``prepare`` made of the base's tensor, quantised and back if training did so.
        """
        return None

    def is_addition(self, name: str) -> bool:
        """Whether merging adds the adapter's tensor ``name`` to the checkpoint as it is."""
        return False


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
