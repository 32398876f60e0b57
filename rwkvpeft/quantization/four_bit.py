"""4 bits per weight: an index into a table of 16 numbers, times one scale per block of 64.

nf4 has the quantiles of a normal distribution as its table, fp4 the numbers of a float with 2 exponent bits and 1
mantissa bit. Source: Dettmers et al., QLoRA (arXiv 2305.14314); bitsandbytes' ``quantize_4bit``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rwkvpeft.quantization.format import CHUNK, Format, fp32_chunks
from rwkvpeft.quantization.int8 import put
from rwkvpeft.quantization.library import bitsandbytes_functions

BLOCK = 64
SCALE_BLOCK = 256


@dataclass(frozen=True)
class FourBit(Format):
    """Blocks of 64 weights end to end: two codes to a byte and one fp32 scale.

    Args:
        double: the scales, less their mean, are in turn int8 in blocks of 256 (QLoRA's double quantisation).
    """

    name: ClassVar[str]
    can_double: ClassVar[bool] = True
    double: bool = False

    @property
    def is_double(self) -> bool:
        """See ``Format.is_double``."""
        return self.double

    @property
    def bits(self) -> float:
        """See ``Format.bits``."""
        scale_bits = 8 + 32 / SCALE_BLOCK if self.double else 32
        return 4 + scale_bits / BLOCK

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """``codes`` and ``scales``; with ``double`` ``scale_codes``, ``scale_scales`` and ``scale_mean`` instead."""
        count = shape[0] * shape[1]
        blocks = -(-count // BLOCK)
        codes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": ((-(-count // 2),), torch.uint8)}
        if not self.double:
            return codes | {"scales": ((blocks,), torch.float32)}
        return codes | {
            "scale_codes": ((blocks,), torch.uint8),
            "scale_scales": ((-(-blocks // SCALE_BLOCK),), torch.float32),
            "scale_mean": ((), torch.float32),
        }

    def quantize(self, weight: Tensor, *, name: str = "a weight") -> dict[str, Tensor]:
        """See ``Format.quantize``."""
        functions = bitsandbytes_functions()
        codes = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8, device=weight.device)
        scales = torch.empty(-(-weight.numel() // BLOCK), dtype=torch.float32, device=weight.device)
        for index, chunk in enumerate(fp32_chunks(weight, name)):
            part, state = functions.quantize_4bit(chunk, blocksize=BLOCK, quant_type=self.name)
            put(codes, part, index * CHUNK // 2)
            put(scales, state.absmax, index * CHUNK // BLOCK)
        if not self.double:
            return {"codes": codes, "scales": scales}
        mean = scales.mean() if len(scales) else scales.new_zeros(())
        scale_codes, state = functions.quantize_blockwise(scales - mean, blocksize=SCALE_BLOCK)
        return {"codes": codes, "scale_codes": scale_codes, "scale_scales": state.absmax, "scale_mean": mean}

    def dequantize(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """See ``Format.dequantize``."""
        functions, codes = bitsandbytes_functions(), packed["codes"]
        count = shape[0] * shape[1]
        work = dtype if dtype.itemsize <= 4 else torch.float32
        if count == 0:
            return torch.empty(shape, dtype=dtype, device=codes.device)
        # as one row of an even length: odd rows would go through a slow path that torch.compile is tried on
        even = torch.Size((1, 2 * len(codes)))
        state = functions.QuantState(
            self._scales(packed), shape=even, code=_table(self.name, codes.device), blocksize=BLOCK,
            quant_type=self.name, dtype=work,
        )
        flat: Tensor = functions.dequantize_4bit(codes[:, None], state)
        return flat.reshape(-1)[:count].view(shape).to(dtype)

    def _scales(self, packed: Mapping[str, Tensor]) -> Tensor:
        if not self.double:
            return packed["scales"]
        scales: Tensor = bitsandbytes_functions().dequantize_blockwise(
            packed["scale_codes"], absmax=packed["scale_scales"], blocksize=SCALE_BLOCK
        )
        return scales + packed["scale_mean"]


@functools.cache
def _table(name: str, device: torch.device) -> Tensor:
    table: Tensor = bitsandbytes_functions().get_4bit_type(name, device=device)
    return table


@dataclass(frozen=True)
class Nf4(FourBit):
    """4-bit NormalFloat."""

    name: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class Fp4(FourBit):
    """4-bit float."""

    name: ClassVar[str] = "fp4"
