"""Several adapters on one model, each with its own tensors: state tuning beside another method, or layer profiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter, Rates
from rwkvpeft.errors import ContractError


class CombinedAdapter(Adapter):
    """Its members in turn. No two of them may change the same tensor.

    Args:
        name: the method as a user writes it, as lora+state.
        members: the adapters.
        settings: what builds it again.
        train_parts: base parameters trained beside all of them.
    """

    Config: ClassVar[type] = dict

    def __init__(
        self, name: str, members: Sequence[Adapter], settings: Mapping[str, Any], train_parts: Iterable[str] = ()
    ) -> None:
        super().__init__(dict(settings), train_parts)
        self.name = name  # type: ignore[misc]
        self.members = list(members)

    def settings(self) -> dict[str, Any]:
        """What it was built from."""
        return dict(self.config)

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each member renames its own."""
        for member in self.members:
            tensors = member.rename(tensors)
        return dict(tensors)

    def take_constants(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each member takes its own."""
        for member in self.members:
            tensors = member.take_constants(tensors)
        return dict(tensors)

    def prepare(self, path: str, weight: Tensor) -> Tensor:
        """Each member in turn."""
        for member in self.members:
            weight = member.prepare(path, weight)
        return weight

    def trains(self, name: str) -> bool:
        """Whether any member does, or a part."""
        return super().trains(name) or any(member.trains(name) for member in self.members)

    def insert(self, model: nn.Module) -> None:
        """Add each member's parameters."""
        for member in self.members:
            member.insert(model)

    def attach_parts(self, model: nn.Module, exclude: set[str]) -> None:
        """Parts of all members, each base parameter once."""
        taken = set(exclude)
        for member in self.members:
            member.attach_parts(model, exclude=taken)
            taken |= set(member.parts.tensors(model))
        super().attach_parts(model, exclude=taken)

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """All members' tensors, their trained parts of the base included.

        Raises: ContractError if two members share a name.
        """
        tensors: dict[str, Tensor] = {}
        for member in self.members:
            own = member.trained_tensors(model)
            if both := own.keys() & tensors.keys():
                raise ContractError(f"two adapters have {sorted(both)[0]}")
            tensors |= own
        return tensors

    def constants(self, model: nn.Module) -> dict[str, Tensor]:
        """All members' constants."""
        return {name: tensor for member in self.members for name, tensor in member.constants(model).items()}

    def rates(self, name: str) -> Rates | None:
        """The first member's that has some."""
        found = (member.rates(name) for member in self.members)
        return next((rates for rates in found if rates is not None), None)

    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Each member in turn."""
        for member in self.members:
            member.after_step(model, step, total_steps)

    def switch(self, model: nn.Module, *, on: bool) -> None:
        """Switch each member; base parameters that a member trains go back and forth with it."""
        for member in self.members:
            member.switch(model, on=on)
            member.parts.show(model, trained=on)

    def sources(self, name: str) -> tuple[str, ...]:
        """All members' sources."""
        return tuple(source for member in self.members for source in member.sources(name))

    def changes(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> bool:
        """Whether any member changes it."""
        return any(member.changes(name, shape, tensors) for member in self.members)

    def merge(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Each member in turn on the result of the one before; they do not share a tensor."""
        merged: Tensor | None = None
        for member in self.members:
            more = member.merge(name, base if merged is None else merged, tensors)
            merged = merged if more is None else more
        return merged

    def is_addition(self, name: str) -> bool:
        """Whether a member adds it."""
        return any(member.is_addition(name) for member in self.members)
