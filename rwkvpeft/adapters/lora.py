"""Low-rank adaptation: a frozen linear plus the product of two thin trained matrices; and DoRA on top of it.

Source: Hu et al., LoRA (arXiv 2106.09685); Kalajdzievski, rsLoRA (arXiv 2312.03732); Liu et al., DoRA
(arXiv 2402.09353). Names in files as RWKV-PEFT writes them: ``...key.lora_A`` (r, in) and ``...key.lora_B`` (out, r);
DoRA adds ``...key.lora_magnitude_vector`` (out,), Hugging Face peft's name (RWKV-LM-RLHF calls it lora_M).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpeft.adapters.frozen_products import is_frozen, with_lora
from rwkvpeft.adapters.linear import AdaptedLinear, LinearAdapter
from rwkvpeft.adapters.settings import LoraConfig
from rwkvpeft.adapters.targets import device_of
from rwkvpeft.errors import UserError

_ROWS = 1024
# a row of zeros has no direction: it stays a row of zeros instead of turning into NaN
_SHORTEST = 1e-12


class LoraLinear(AdaptedLinear):
    """``base(x) + scaling * (dropout(x) A^T) B^T``; equal to the base at first, B being zero.

    Args:
        base: the frozen linear.
        rank: r.
        scaling: factor on the product.
        dropout: of the update's input.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(base)
        device = device_of(base)
        self.scaling = scaling
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def adapted(self, x: Tensor) -> Tensor:
        """Base and update. With dropout or a trained base this is left to autograd, which keeps more."""
        if is_frozen(self.base) and not (self.training and self.dropout):
            return with_lora(self.base, x, self.lora_A, self.lora_B, self.scaling)
        return cast(Tensor, self.base(x) + self.update(x))

    def update(self, x: Tensor) -> Tensor:
        """What the two matrices add."""
        thin = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return F.linear(thin * self.scaling, self.lora_B.to(x.dtype))


def check_rank(method: str, rank: int, path: str, shape: Sequence[int]) -> None:
    """Raises: UserError if a product of that rank would have more numbers than it can tell apart."""
    if rank > min(shape):
        raise UserError(f"the r of {method} is larger than {path}", found=rank, expected=f"up to {min(shape)}")


class LoraAdapter(LinearAdapter):
    """LoRA on the large linears of the blocks."""

    name: ClassVar[str] = "lora"
    Config = LoraConfig
    aliases: ClassVar[Mapping[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    parts_of_linear: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    layer: ClassVar[type[LoraLinear]] = LoraLinear
    config: LoraConfig

    def make_layer(self, path: str, base: nn.Linear) -> AdaptedLinear:
        """See ``LinearAdapter.make_layer``."""
        config = self.config
        check_rank(self.name, config.r, path, (base.out_features, base.in_features))
        return self.layer(base, config.r, config.scaling(config.r), float(config.lora_dropout))

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Two thin matrices and nothing that belongs to DoRA or PiSSA."""
        endings = {name.rpartition(".")[2] for name in tensors}
        return "lora_A" in endings and not endings & {"lora_magnitude_vector", "lora_M", "init_lora_A"}

    def expected_shapes(self, out: int, in_: int, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """See ``LinearAdapter.expected_shapes``."""
        rank = tensors["lora_A"].shape[0]
        return {"lora_A": (rank, in_), "lora_B": (out, rank)}

    def merged_weight(self, path: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``W + scaling * B A``. The rank is the file's own."""
        lora_a, lora_b = tensors["lora_A"], tensors["lora_B"]
        return (lora_b @ lora_a).mul_(self.config.scaling(lora_a.shape[0])).add_(base)


class DoraLinear(LoraLinear):
    """Each row of ``W + scaling * B A`` brought to a trained length: ``m_o * V_o x / |V_o|``.

    The lengths |V_o| are constants to the gradient (section 4.3 of the paper).
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scaling, dropout)
        self.lora_magnitude_vector = nn.Parameter(self._lengths())

    def adapted(self, x: Tensor) -> Tensor:
        """Base and update, each output channel scaled."""
        # less 1, since near 1 bf16 has steps of 0.4 to 0.8 percent, more than a magnitude moves in many steps
        gain = (self.lora_magnitude_vector / self._lengths() - 1).to(x.dtype)
        # apart, since their sum is rounded: the small product would be lost in it
        base, update = self.base(x), self.update(x)
        return cast(Tensor, base + torch.addcmul(update, base + update, gain))

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        weight = self.base.dequantized()  # type: ignore[operator]
        return row_lengths(weight, self.lora_A, self.lora_B, self.scaling)


def row_lengths(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Length of each row of ``weight + scaling * B A``, fp32 (out,), never zero; a few rows at a time."""
    lengths = [
        torch.linalg.vector_norm(torch.addmm(rows.float(), thin, lora_a, alpha=scaling), dim=1)
        for rows, thin in zip(weight.split(_ROWS), lora_b.split(_ROWS), strict=True)
    ]
    return torch.cat(lengths).clamp_min(_SHORTEST)


class DoraAdapter(LoraAdapter):
    """DoRA: direction by LoRA, length of each output row trained on its own."""

    name: ClassVar[str] = "dora"
    parts_of_linear: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_magnitude_vector")
    foreign_parts: ClassVar[Mapping[str, str]] = {"lora_M": "lora_magnitude_vector"}
    layer: ClassVar[type[LoraLinear]] = DoraLinear

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """There is a magnitude beside the two matrices."""
        return any(name.endswith((".lora_magnitude_vector", ".lora_M")) for name in tensors)

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """RWKV-LM-RLHF keeps the magnitude as a column (out, 1)."""
        renamed = super().rename(tensors)
        return {
            name: tensor.reshape(-1) if name.endswith(".lora_magnitude_vector") else tensor
            for name, tensor in renamed.items()
        }

    def expected_shapes(self, out: int, in_: int, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """See ``LinearAdapter.expected_shapes``."""
        return {**super().expected_shapes(out, in_, tensors), "lora_magnitude_vector": (out,)}

    def merged_weight(self, path: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``m_o V_o / |V_o|`` with ``V = W + scaling * B A``."""
        direction = super().merged_weight(path, base, tensors)
        lengths = torch.linalg.vector_norm(direction, dim=1).clamp_min(_SHORTEST)
        return direction.mul_((tensors["lora_magnitude_vector"] / lengths).unsqueeze(1))
