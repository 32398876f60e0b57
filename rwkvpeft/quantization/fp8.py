"""8-bit floats (e4m3) with one fp32 scale per output row, in plain PyTorch.

Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rwkvpeft.quantization.format import CHUNK, Format, fp32_chunks

LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ALIGNMENT = 16


@dataclass(frozen=True)
class Fp8(Format):
    """Each row is divided by a scale that maps its largest magnitude to 448, and rounded to e4m3.

    The bytes rest as uint8, which every backend and every file knows how to move. On a GPU with an fp8 matrix product
    16-bit activations are rounded to e4m3 row by row too; the backward pass takes the dequantised weight and the
    activations as they were.
    """

    name: ClassVar[str] = "fp8"

    @property
    def bits(self) -> float:
        """See ``Format.bits``; the scales of a row are lost in it."""
        return 8.0

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """``codes`` as the weight, the bytes of its e4m3 numbers; ``scales`` one per output row."""
        return {"codes": (shape, torch.uint8), "scales": ((shape[0],), torch.float32)}

    def quantize(self, weight: Tensor, *, name: str = "a weight") -> dict[str, Tensor]:
        """See ``Format.quantize``."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        rows = max(CHUNK // max(weight.shape[1], 1), 1)
        for start in range(0, weight.shape[0] if weight.numel() else 0, rows):
            part = slice(start, start + rows)
            whole = torch.cat(list(fp32_chunks(weight[part], name))).view(-1, weight.shape[1])
            rounded, scales[part] = _round_rows(whole)
            codes[part] = rounded.view(torch.uint8)
        return {"codes": codes, "scales": scales}

    def dequantize(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """See ``Format.dequantize``."""
        out = torch.empty(shape, dtype=dtype, device=packed["codes"].device)
        rows = max(CHUNK // max(shape[1], 1), 1)
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            exact = packed["codes"][part].view(torch.float8_e4m3fn).float()
            out[part] = exact.mul_(packed["scales"][part, None])
        return out

    def product(self, x: Tensor, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """See ``Format.product``."""
        fits = shape[0] % _ALIGNMENT == 0 and shape[1] % _ALIGNMENT == 0 and x.numel() > 0
        if fits and x.dtype in (torch.bfloat16, torch.float16) and has_fp8_product(x.device):
            return _fp8_product(x, packed["codes"], packed["scales"])
        return super().product(x, packed, shape)


def _round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of fp32 to e4m3 and each row's scale, (rows,) fp32."""
    # of a row of zeros the scale is the smallest number, so that nothing is divided by zero
    scales = (matrix.abs().amax(dim=1) / LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
    return (matrix / scales[:, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


def _fp8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """``x`` (..., in), rounded to e4m3 row by row, times e4m3 ``codes`` (out, in) on the GPU's own units."""
    rounded, x_scales = _round_rows(x.reshape(-1, x.shape[-1]).float())
    product = torch._scaled_mm(
        rounded,
        codes.view(torch.float8_e4m3fn).t(),
        scale_a=x_scales[:, None],
        scale_b=scales[None, :],
        out_dtype=torch.bfloat16,
    )
    return product.view(*x.shape[:-1], codes.shape[0]).to(x.dtype)


@functools.cache
def has_fp8_product(device: torch.device) -> bool:
    """Whether ``device`` multiplies e4m3 matrices with a scale per row: found out by one small product."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(_ALIGNMENT, _ALIGNMENT, device=device)
    try:
        product = _fp8_product(ones.bfloat16(), *_packed_ones(ones))
    except RuntimeError:
        # kernels for scales per row came to PyTorch chip by chip
        return False
    return bool((product == _ALIGNMENT).all())


def _packed_ones(ones: Tensor) -> tuple[Tensor, Tensor]:
    rounded, scales = _round_rows(ones)
    return rounded.view(torch.uint8), scales
