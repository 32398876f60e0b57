"""8 bits per weight: an index into a table of 256 numbers, times one scale per block.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861); bitsandbytes'
``quantize_blockwise`` with its default table, as RWKV-PEFT's ``--quant int8``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rwkvpeft.quantization.format import CHUNK, Format, fp32_chunks
from rwkvpeft.quantization.library import bitsandbytes_functions

# Relative error of normal weights by block size: 4096 1.52%, 1024 1.27%, 512 1.18%, 256 1.10%, 128 1.03%, 64 0.96%.
# Halving a block thus gains 0.1 bit of precision; below 256 the scales cost more than that.
BLOCK = 256


@dataclass(frozen=True)
class Int8(Format):
    """Blocks of 256 weights end to end, each an index into bitsandbytes' "dynamic" table and one fp32 scale."""

    name: ClassVar[str] = "int8"

    @property
    def bits(self) -> float:
        """See ``Format.bits``."""
        return 8 + 32 / BLOCK

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """``codes`` as the weight, ``scales`` one per block."""
        return {"codes": (shape, torch.uint8), "scales": ((-(-shape[0] * shape[1] // BLOCK),), torch.float32)}

    def quantize(self, weight: Tensor, *, name: str = "a weight") -> dict[str, Tensor]:
        """See ``Format.quantize``."""
        functions, table = bitsandbytes_functions(), _table(weight.device)
        codes = torch.empty(weight.numel(), dtype=torch.uint8, device=weight.device)
        scales = torch.empty(-(-weight.numel() // BLOCK), dtype=torch.float32, device=weight.device)
        for index, chunk in enumerate(fp32_chunks(weight, name)):
            part, state = functions.quantize_blockwise(chunk, code=table, blocksize=BLOCK)
            put(codes, part, index * CHUNK)
            put(scales, state.absmax, index * CHUNK // BLOCK)
        return {"codes": codes.view(weight.shape), "scales": scales}

    def dequantize(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """See ``Format.dequantize``."""
        functions, codes = bitsandbytes_functions(), packed["codes"]
        out = torch.empty(shape, dtype=dtype if dtype.itemsize <= 4 else torch.float32, device=codes.device)
        if out.numel():
            state = functions.QuantState(packed["scales"], code=_table(codes.device), blocksize=BLOCK, dtype=out.dtype)
            out = functions.dequantize_blockwise(codes, state)
        return out.to(dtype)


def put(whole: Tensor, part: Tensor, start: int) -> None:
    """Copy ``part``, flattened, into the flat tensor ``whole`` from ``start`` on."""
    whole[start : start + part.numel()] = part.reshape(-1)


@functools.cache
def _table(device: torch.device) -> Tensor:
    table: Tensor = bitsandbytes_functions().create_dynamic_map()
    return table.to(device)
