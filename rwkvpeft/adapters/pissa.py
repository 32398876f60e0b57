"""PiSSA: the principal components of each weight are trained, the rest of it stays frozen.

Source: Meng et al., PiSSA (arXiv 2404.02948). The weight W is cut into its truncated SVD, as B0 A0 with the square
roots of the singular values on both sides, and the residual W - B0 A0, which is frozen (and quantised: QPiSSA). There
is no scaling. Names in files as RWKV-PEFT writes them: ``...key.lora_A`` (r, in), ``...key.lora_B`` (out, r), and for
the start values ``...key.init_lora_A``, ``...key.init_lora_B``. Those stand in every adapter file too, where
RWKV-PEFT's merging passes over them: an adapter without its start values cannot be merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpeft.adapters.linear import AdaptedLinear, LinearAdapter
from rwkvpeft.adapters.lora import LoraLinear, check_rank
from rwkvpeft.adapters.settings import PissaConfig
from rwkvpeft.adapters.targets import DEFAULT_TARGETS, fits
from rwkvpeft.errors import ContractError, UserError

INITIAL = {"init_lora_A": "lora_A", "init_lora_B": "lora_B"}


class PissaLinear(LoraLinear):
    """``residual(x) + (x A^T) B^T``, A and B starting at the principal components.

    Args:
        initial: ``init_lora_A`` and ``init_lora_B``; kept in host memory, since training never reads them.
    """

    def __init__(self, base: nn.Linear, initial: Mapping[str, Tensor]) -> None:
        super().__init__(base, initial["init_lora_A"].shape[0], scaling=1.0)
        self.initial = {name: tensor.to("meta" if tensor.is_meta else "cpu") for name, tensor in initial.items()}
        for name, part in INITIAL.items():
            trained: Tensor = getattr(self, part)
            trained.data.copy_(initial[name])

    def original(self, x: Tensor) -> Tensor:
        """Residual and principal components as they were."""
        y: Tensor = self.base(x)
        first, second = (self.initial[name].to(x) for name in INITIAL)
        return y + F.linear(F.linear(x, first), second)


class PissaAdapter(LinearAdapter):
    """PiSSA on the large linears of the blocks."""

    name: ClassVar[str] = "pissa"
    Config = PissaConfig
    aliases: ClassVar[Mapping[str, str]] = {"pissa_r": "r"}
    parts_of_linear: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    config: PissaConfig

    def __init__(self, config: PissaConfig | None = None, train_parts: tuple[str, ...] = ()) -> None:
        super().__init__(config, train_parts)
        self._initial: dict[str, Tensor] = {}
        self._given = False

    def take_constants(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the start values of a file; RWKV-PEFT's newer ones have ``model.`` before each name."""
        rest = {}
        for name, tensor in tensors.items():
            if name.rpartition(".")[2] in INITIAL:
                self._initial[name.removeprefix("model.")] = tensor.float()
            else:
                rest[name] = tensor
        self._given = bool(self._initial)
        return rest

    def prepare(self, path: str, weight: Tensor) -> Tensor:
        """The residual of a target's weight, fp32; its principal components are kept for ``insert``."""
        if not self._is_target(path):
            return weight
        if f"{path}.init_lora_A" not in self._initial:
            self._initial |= {f"{path}.{name}": tensor for name, tensor in self._decompose(path, weight).items()}
        first, second = (self._initial_of(path)[name].to(weight.device) for name in INITIAL)
        return torch.addmm(weight.float(), second, first, alpha=-1)

    def _is_target(self, path: str) -> bool:
        if self._given:
            return f"{path}.init_lora_A" in self._initial
        wanted = self.config.target_modules or DEFAULT_TARGETS
        return any(fits(path, target) for target in wanted)

    def _decompose(self, path: str, weight: Tensor) -> dict[str, Tensor]:
        rank = self.config.r
        check_rank(self.name, rank, path, weight.shape)
        left, values, right = torch.svd_lowrank(weight.float(), q=rank, niter=self.config.svd_niter)
        root = values.sqrt()
        return {"init_lora_A": root.unsqueeze(1) * right.T, "init_lora_B": left * root}

    def _initial_of(self, path: str) -> dict[str, Tensor]:
        return {name: self._initial[f"{path}.{name}"] for name in INITIAL}

    def insert(self, model: nn.Module) -> None:
        """Wrap each target, whose weight must be the residual that ``prepare`` made."""
        super().insert(model)
        self._initial = {}

    def make_layer(self, path: str, base: nn.Linear) -> AdaptedLinear:
        """See ``LinearAdapter.make_layer``. A base that was loaded without ``prepare`` gives up its part now."""
        if f"{path}.init_lora_A" not in self._initial:
            if self._given:
                raise UserError(f"the PiSSA adapter has no start values for {path}",
                                fix="target_modules as when it was trained, and the start values of all of them")
            if "weight" not in dict(base.named_parameters()):
                raise ContractError(f"{path} was quantised before PiSSA took out its principal components")
            base.weight.data = self.prepare(path, base.weight.data).to(base.weight.dtype)
        return PissaLinear(base, self._initial_of(path))

    def constants(self, model: nn.Module) -> dict[str, Tensor]:
        """The start values, which merging takes out of the base."""
        layers = {path: model.get_submodule(path) for path in self._paths}
        return {
            f"{path}.{name}": tensor
            for path, layer in layers.items() if isinstance(layer, PissaLinear)
            for name, tensor in layer.initial.items()
        }

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """The file has start values."""
        return any(name.endswith(".init_lora_A") for name in tensors)

    def expected_shapes(self, out: int, in_: int, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """See ``LinearAdapter.expected_shapes``."""
        rank = tensors["lora_A"].shape[0]
        return {"lora_A": (rank, in_), "lora_B": (out, rank)}

    def merged_weight(self, path: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``residual + B A``; the base is the residual already.

        Raises: UserError if the start values are not known.
        """
        if f"{path}.init_lora_A" not in self._initial:
            raise UserError(
                "a PiSSA adapter cannot be merged without its start values",
                found=f"no {path}.init_lora_A",
                fix="--lora_init init_pissa.pth, the file beside the adapter",
            )
        return base.addmm_(tensors["lora_B"], tensors["lora_A"])
