"""What the adapters of linears share: finding and wrapping them, and naming their tensors in files.

Letters: r rank, (out, in) the size of the adapted weight.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.adapters.targets import replace_module, target_paths
from rwkvpeft.errors import UserError


class AdaptedLinear(nn.Module):
    """A frozen linear, and what is trained around it.

    Args:
        base: a linear of any storage format, with ``forward`` and ``dequantized()``.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.enabled = True
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out) in the dtype of x."""
        return self.adapted(x) if self.enabled else self.original(x)

    def adapted(self, x: Tensor) -> Tensor:
        """The output with the adapter's effect."""
        raise NotImplementedError

    def original(self, x: Tensor) -> Tensor:
        """The output of the base model."""
        y: Tensor = self.base(x)
        return y


class LinearAdapter(Adapter):
    """An adapter that wraps linears. A method says how one layer is made and how one weight is merged."""

    parts_of_linear: ClassVar[tuple[str, ...]]
    """Names of the trained tensors of one linear, after its path and a dot."""
    foreign_parts: ClassVar[Mapping[str, str]] = {}
    """Other programs' names of those: other name to ours."""

    def __init__(self, config: Any = None, train_parts: Any = ()) -> None:
        super().__init__(config, train_parts)
        self._paths: list[str] = []

    @abstractmethod
    def make_layer(self, path: str, base: nn.Linear) -> AdaptedLinear:
        """The layer that takes the place of the linear at ``path``.

        Raises: UserError if the settings do not suit its size.
        """

    @abstractmethod
    def merged_weight(self, path: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight (out, in) that computes what base and adapter do together.

        Args:
            base: fp32; may be changed in place.
            tensors: fp32, by the names in ``parts_of_linear``; their shapes have been checked.
        """

    @abstractmethod
    def expected_shapes(self, out: int, in_: int, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes the tensors of a linear must have, the rank taken from the tensors themselves."""

    def insert(self, model: nn.Module) -> None:
        """Wrap each target."""
        self._paths = target_paths(model, self.config.target_modules)
        for path in self._paths:
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear)
            replace_module(model, path, self.make_layer(path, base))

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained tensors of every adapted linear."""
        return {
            f"{path}.{part}": getattr(model.get_submodule(path), part)
            for path in self._paths
            for part in self.parts_of_linear
        }

    def switch(self, model: nn.Module, *, on: bool) -> None:
        """Let the wrapped linears compute with or without the adapter."""
        for path in self._paths:
            layer = model.get_submodule(path)
            assert isinstance(layer, AdaptedLinear)
            layer.enabled = on

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """A file holds every tensor of the method and no other name of a linear's adapter."""
        endings = {name.rpartition(".")[2] for name in tensors}
        endings = {cls.foreign_parts.get(ending, ending) for ending in endings}
        return set(cls.parts_of_linear) <= endings

    def file_settings(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Targets and rank as the file has them."""
        first = self.parts_of_linear[0]
        found = {name.removesuffix(f".{first}"): tensor for name, tensor in tensors.items()
                 if name.endswith(f".{first}")}
        # a file of several ranks can be merged all the same: each linear's own tensors decide there
        rank = max((self.rank_of(tensor) for tensor in found.values()), default=self.config.r)
        return {**self.settings(), "r": rank, "target_modules": list(found)}

    def rank_of(self, tensor: Tensor) -> int:
        """The rank that the first tensor of a linear tells."""
        return tensor.shape[0]

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names of other programs become ours."""
        renamed = {}
        for name, tensor in tensors.items():
            path, _, part = name.rpartition(".")
            renamed[f"{path}.{self.foreign_parts[part]}" if part in self.foreign_parts else name] = tensor
        return renamed

    def sources(self, name: str) -> tuple[str, ...]:
        """The trained tensors of the linear whose weight is ``name``."""
        if not name.endswith(".weight"):
            return ()
        path = name.removesuffix(".weight")
        return tuple(f"{path}.{part}" for part in self.parts_of_linear)

    def changes(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> bool:
        """See ``Adapter.changes``.

        Raises: UserError if some tensors of a linear are missing or do not fit the base.
        """
        sources = self.sources(name)
        found = [source for source in sources if source in tensors]
        if not found:
            return False
        if len(found) != len(sources):
            raise UserError(f"the adapter has {found[0]} but not its partner", expected=sources)
        parts = {source.rpartition(".")[2]: tensors[source] for source in sources}
        shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        usable = len(shape) == 2 and all(tensor.dim() > 0 and tensor.numel() > 0 for tensor in parts.values())
        expected = self.expected_shapes(shape[0], shape[1], parts) if usable else {}
        if shapes != expected:
            raise UserError(f"the adapter does not fit {name} of the base model", found=_shown(shapes),
                            expected=_shown(expected) or f"tensors of a weight {shape}")
        return True

    def merge(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """See ``Adapter.merge``.

        Raises: UserError as ``changes`` does.
        """
        if not self.changes(name, tuple(base.shape), tensors):
            return None
        parts = {source.rpartition(".")[2]: tensors[source].float() for source in self.sources(name)}
        return self.merged_weight(name.removesuffix(".weight"), base, parts)


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{part} {shape}" for part, shape in shapes.items())
