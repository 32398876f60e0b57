"""What all Triton kernels share: how operands of a product are rounded, and whether kernels are interpreted.

Under ``TRITON_INTERPRET=1`` kernels run on a CPU, where products are made in fp32: the interpreter's bf16 products
are wrong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def dot(a, b, MODE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Matrix product accumulated in fp32, the operands rounded as ``MODE`` says (see ``dot_mode``)."""
    if MODE == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif MODE == "fp16":
        product = tl.dot(a.to(tl.float16), b.to(tl.float16))
    elif MODE == "tf32":
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    elif MODE == "tf32x3":
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return product


@triton.jit
def rounded(x, MODE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """``x`` in fp32, with the 16-bit rounding that ``dot`` gives an operand."""
    if MODE == "bf16":
        x = x.to(tl.bfloat16)
    elif MODE == "fp16":
        x = x.to(tl.float16)
    return x.to(tl.float32)


def interpreted() -> bool:
    """Whether this process interprets Triton's kernels on a CPU instead of compiling them."""
    return not isinstance(dot, triton.JITFunction)


def dot_mode(dtype: torch.dtype) -> str:
    """How products round their operands for activations of ``dtype``.

    bf16 activations go through bf16 products; fp16 ones through tf32, since states leave fp16's range; fp32 ones
    through three tf32 products, which is fp32 but for the last bits. Interpreted: always fp32.
    """
    if interpreted():
        return "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(dtype, "tf32x3")
