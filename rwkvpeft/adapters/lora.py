"""Low-rank adaptation: a frozen linear plus the product of two thin trained matrices.

Source: Hu et al., LoRA (arXiv 2106.09685). Names in files as RWKV-PEFT writes them: ``...key.lora_A`` (r, in) and
``...key.lora_B`` (out, r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter, few, replace_module
from rwkvpeft.config.flags import flag
from rwkvpeft.errors import UserError

DEFAULT_TARGETS = ("receptance", "key", "value", "output", "gate")


@dataclass(frozen=True)
class LoraConfig:
    """Settings of LoRA. Raises UserError for a value out of range."""

    r: int = flag(8, help="rank of the update")
    lora_alpha: float = flag(32, help="the update is scaled by lora_alpha / r", alias="alpha")
    lora_dropout: float = flag(0.01, help="dropout of the update's input", alias="dropout")
    target_modules: list[str] | None = flag(
        None, help="linears to adapt by the end of their path, as key, att.key or blocks.0.att.key; "
        "none given: receptance, key, value, output and gate of att and ffn",
    )

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise UserError("LoRA's r cannot be used", found=self.r, expected="a whole number from 1")
        if not _is_number(self.lora_alpha) or self.lora_alpha <= 0:
            raise UserError("LoRA's lora_alpha cannot be used", found=self.lora_alpha, expected="a number above 0")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise UserError("LoRA's lora_dropout cannot be used", found=self.lora_dropout, expected="0 up to below 1")
        targets = self.target_modules
        if isinstance(targets, str):
            object.__setattr__(self, "target_modules", [part.strip() for part in targets.split(",")])
        elif targets is not None and not all(isinstance(target, str) for target in targets):
            raise UserError("LoRA's target_modules cannot be used", found=targets, expected="a list of names")

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.lora_alpha / self.r


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class LoraLinear(nn.Module):
    """``base(x) + scaling * (dropout(x) A^T) B^T``; equal to the base at first, B being zero.

    Args:
        base: a frozen linear from ``in_features`` to ``out_features``, of any storage format.
        config: rank, scaling and dropout.
    """

    def __init__(self, base: nn.Module, in_features: int, out_features: int, config: LoraConfig) -> None:
        super().__init__()
        device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))
        self.base = base
        self.scaling = config.scaling
        self.dropout = float(config.lora_dropout)
        self.enabled = True
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out) in the dtype of x."""
        y = self.base(x)
        if not self.enabled:
            return cast(Tensor, y)
        thin = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return cast(Tensor, y + F.linear(thin * self.scaling, self.lora_B.to(x.dtype)))


class LoraAdapter(Adapter):
    """LoRA on the large linears of the blocks."""

    name: ClassVar[str] = "lora"
    Config = LoraConfig
    aliases: ClassVar[Mapping[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    config: LoraConfig

    def _insert(self, model: nn.Module) -> None:
        for path in self._targets(model):
            base = model.get_submodule(path)
            out_features, in_features = _linear_shape(base) or (0, 0)
            replace_module(model, path, LoraLinear(base, in_features, out_features, self.config))

    def _targets(self, model: nn.Module) -> list[str]:
        linears = [
            path for path, module in model.named_modules() if path.startswith("blocks.") and _linear_shape(module)
        ]
        wanted = self.config.target_modules
        chosen = [path for path in linears if any(_ends_with(path, target) for target in wanted or DEFAULT_TARGETS)]
        unmatched = [target for target in wanted or () if not any(_ends_with(path, target) for path in linears)]
        if unmatched or not chosen:
            offered = sorted({".".join(path.split(".")[2:]) for path in linears})
            raise UserError("target_modules names no linear of this model", found=few(unmatched), expected=offered)
        return chosen

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """``<path>.lora_A`` and ``<path>.lora_B`` of every adapted linear."""
        return {
            f"{path}.{part}": getattr(module, part)
            for path, module in model.named_modules()
            if isinstance(module, LoraLinear)
            for part in ("lora_A", "lora_B")
        }

    def _switch(self, model: nn.Module, *, on: bool) -> None:
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.enabled = on

    def sources(self, name: str) -> tuple[str, ...]:
        """The two factors that belong to a linear's weight."""
        if not name.endswith(".weight"):
            return ()
        path = name.removesuffix(".weight")
        return f"{path}.lora_A", f"{path}.lora_B"

    def merge(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """``W + scaling * B A``. The rank is the file's own.

        Raises: UserError if one factor is missing or the shapes disagree.
        """
        sources = self.sources(name)
        found = [source for source in sources if source in tensors]
        if not found:
            return None
        if len(found) == 1:
            raise UserError(f"the adapter has {found[0]} but not its partner", expected=sources)
        lora_a, lora_b = (tensors[source].float() for source in sources)
        if lora_a.dim() != 2 or lora_b.dim() != 2 or (*lora_b.shape, *lora_a.shape) != (
            base.shape[0], lora_a.shape[0], lora_a.shape[0], base.shape[-1],
        ):
            raise UserError(
                f"the adapter does not fit {name} of the base model",
                found=f"lora_A {tuple(lora_a.shape)}, lora_B {tuple(lora_b.shape)}",
                expected=f"(r, {base.shape[-1]}) and ({base.shape[0]}, r)",
            )
        update = (lora_b @ lora_a).mul_(self.config.lora_alpha / lora_a.shape[0])
        return update.add_(base).to(base.dtype)


def _ends_with(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear, also of one whose weight is stored quantised; None for any other module."""
    if isinstance(module, nn.Embedding):
        return None
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    out_features, in_features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(out_features, int) and isinstance(in_features, int):
        return out_features, in_features
    return None
