"""How a frozen weight rests in fewer bits: the contract of every format of ``--quant``.

A format turns a matrix into a few plain tensors ("packed", by short names) and back. Nothing else in this package
knows how many there are or what they mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvpeft.errors import UserError
from rwkvpeft.registry import FORMATS, find

# weights worked on at once: their fp32 copy and the temporaries beside it stay small whatever the matrix
CHUNK = 1 << 20


class Format(ABC):
    """One way to store a frozen matrix (out, in).

    All rounding starts from fp32 copies of the weights, so that it does not depend on the dtype of their file.
    """

    name: ClassVar[str]
    can_double: ClassVar[bool] = False
    """Whether the format takes ``double=True``: its scales are quantised in turn."""

    @property
    def is_double(self) -> bool:
        """Whether the scales are quantised too."""
        return False

    @property
    def label(self) -> str:
        """How messages call the format."""
        return f"{self.name} with quantised scales" if self.is_double else self.name

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits per weight of a large matrix, scales included."""

    @abstractmethod
    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every packed tensor of a matrix of that shape, by its short name."""

    @abstractmethod
    def quantize(self, weight: Tensor, *, name: str = "a weight") -> dict[str, Tensor]:
        """Pack ``weight`` (out, in) of any floating dtype; the packed tensors are on its device.

        Args:
            name: how a message calls the weight.
        Raises: UserError if it holds NaN or infinity, or if the package that packs it is not installed.
        """

    @abstractmethod
    def dequantize(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The matrix of that shape that ``packed`` stands for, in ``dtype``: worked out in fp32 and rounded once."""

    def round_trip(self, weight: Tensor) -> Tensor:
        """What ``weight`` (out, in) becomes by being packed and unpacked, in fp32."""
        out_features, in_features = weight.shape
        return self.dequantize(self.quantize(weight), (out_features, in_features), torch.float32)

    def product(self, x: Tensor, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """``x`` (..., in) times the matrix transposed: (..., out) in the dtype of ``x``."""
        return F.linear(x, self.dequantize(packed, shape, x.dtype))


def build_format(quant: str, *, double: bool = False) -> Format:
    """The format named by ``--quant``.

    Args:
        double: whether the scales of the blocks are quantised in turn.
    Raises: UserError if there is no such format, or ``double`` is asked of one that cannot do it.
    """
    kind: type[Format] = find(FORMATS, quant, flag="--quant")
    if not double:
        return kind()
    if not kind.can_double:
        raise UserError(f"--quant_double has no effect on {quant}", found=f"--quant {quant}", expected="nf4 or fp4",
                        fix="leave --quant_double out")
    return kind(double=True)  # type: ignore[call-arg]


def fp32_chunks(weight: Tensor, name: str) -> Iterator[Tensor]:
    """The weight end to end, in fp32 pieces of ``CHUNK`` numbers, each looked at for what cannot be packed.

    Raises: UserError if the weight ``name`` holds NaN or infinity.
    """
    for part in weight.detach().reshape(-1).split(CHUNK):
        chunk = part.float()
        if not chunk.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity and cannot be quantised", fix="use an undamaged checkpoint")
        yield chunk
