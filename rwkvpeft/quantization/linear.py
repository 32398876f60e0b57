"""A frozen linear whose weight rests quantised.

Adapters know it by ``forward`` and ``dequantized()`` alone, which ``models.layers.Linear`` has as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkvpeft.errors import ContractError
from rwkvpeft.quantization.format import Format


class QuantizedLinear(nn.Linear):
    """A matrix without bias from (..., in) to (..., out), never trained.

    It has no parameter; the packed tensors are buffers. Neither ``.to(dtype)`` nor ``.half()`` changes their dtypes:
    a device may change, a rounded scale would be another weight.

    Args:
        format: how the weight is packed.
        packed: the packed tensors by short name, as ``format.quantize`` gives them; kept, not copied.
    Raises: ContractError if ``packed`` is not of that format and size.
    """

    def __init__(self, in_features: int, out_features: int, format: Format, packed: Mapping[str, Tensor]) -> None:
        # not nn.Linear's: it would make a weight
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.register_parameter("bias", None)
        expected = format.layout(self._shape)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}
        if found != expected:
            raise ContractError(f"a packed {format.name} weight of {found}, expected {expected}")
        for name, tensor in packed.items():
            self.register_buffer(name, tensor.detach())

    @classmethod
    def from_weight(cls, weight: Tensor, format: Format, *, name: str = "a weight") -> QuantizedLinear:
        """Quantise ``weight`` (out, in) on its device.

        Raises: UserError if the weight ``name`` holds NaN or infinity.
        """
        out_features, in_features = weight.shape
        return cls(in_features, out_features, format, format.quantize(weight, name=name))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight (out, in) in fp32, made anew at each access: writing to it changes nothing."""
        return self.dequantized()

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in) as a fresh tensor without gradient, in ``dtype``; None means fp32, which is exact."""
        with torch.no_grad():
            return self.format.dequantize(self.packed(), self._shape, dtype or torch.float32)

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by short name."""
        return {name: self.get_buffer(name) for name in self.format.layout(self._shape)}

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight, in the dtype of ``x``. The backward pass dequantises again."""
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _FrozenProduct.apply(x, self))
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return self.format.product(x, self.packed(), self._shape)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        def same_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return cast(QuantizedLinear, super()._apply(same_dtype, recurse))

    def extra_repr(self) -> str:
        """Sizes and format, for printing the model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


class _FrozenProduct(torch.autograd.Function):
    """``x`` times a frozen matrix: keeps neither ``x``, which only a trained matrix needs, nor the matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return linear._product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        return grad @ ctx.linear.dequantized(grad.dtype), None
