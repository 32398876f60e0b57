"""Layers all versions share. Each computes in the dtype of its input, whatever dtype its parameters have.

Frozen weights rest in the compute dtype and are used as they are; trained ones are fp32 and are cast here, so that
small steps are not lost to rounding. Letters: B batch, T tokens, C channels, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpeft.ops.block.contract import Norm


class Linear(nn.Linear):
    """A matrix without bias: (..., in) to (..., out). ``weight`` is (out, in), its values come from a checkpoint."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as it is: models are built without values."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight, in the dtype of ``x``."""
        return F.linear(x, self.weight.to(x.dtype))

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in) without gradient, in ``dtype``; None keeps its own. May share memory with the weight."""
        return self.weight.detach().to(dtype or self.weight.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, eps 1e-5."""

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C)."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

    def norm(self) -> Norm:
        """What a block's operators need to compute it."""
        return Norm(self.weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """The parameters of a group norm with one group per head, over each token alone; a block's operators compute it.

    v5 divides its input by ``head_size_divisor`` and uses eps 1e-5; v6 and v7 use eps 1e-5 * divisor^2. The two are
    the same function, so that there is one form here.
    """

    def __init__(self, channels: int, divisor: float) -> None:
        super().__init__()
        self.eps = 1e-5 * divisor**2
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def norm(self) -> Norm:
        """What a block's operators need to compute it."""
        return Norm(self.weight, self.bias, self.eps)


def parameter(*shape: int) -> nn.Parameter:
    """A parameter whose values come from a checkpoint or from the version's initial weights."""
    return nn.Parameter(torch.empty(*shape))
