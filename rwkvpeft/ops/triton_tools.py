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
    """Matrix product accumulated in fp32, the operands rounded as ``MODE`` says (see ``dot_mode``).

    ``a`` must not be the transposed or reshaped result of a product if four warps or more share 64 rows: on Hopper
    several versions of Triton, 3.2 to 3.7, then compute wrong (triton-lang/triton issue 6124,
    fla-org/flash-linear-attention issues 640 and 984).
    """
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


def capability() -> int:
    """Ten times the compute capability of the current NVIDIA GPU, 0 where there is none."""
    if interpreted():
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


def dot_mode(dtype: torch.dtype) -> str:
    """How products round their operands for activations of ``dtype``.

    bf16 activations go through bf16 products; fp16 ones through tf32, since states leave fp16's range; fp32 ones
    through three tf32 products, which is fp32 but for the last bits. Interpreted: always fp32.
    """
    if interpreted():
        return "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(dtype, "tf32x3")


@triton.jit
def place_of_chunk(chunks, chunk, tokens, per_row, L: tl.constexpr, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """First token of a chunk of at most ``L`` tokens, int64, counted through all rows; and how many tokens it holds.

    Args:
        chunks: the table of ``Sequences.chunk_tables``, if ``PACKED``.
        tokens, per_row: T of a row and its chunks, if not.
    """
    if PACKED:
        first = tl.load(chunks + chunk * 3 + 1).to(tl.int64)
        count = tl.load(chunks + chunk * 3 + 2)
    else:
        start = (chunk % per_row) * L
        first = (chunk // per_row).to(tl.int64) * tokens + start
        count = tl.minimum(tokens - start, L)
    return first, count


@triton.jit
def chunks_of_sequence(first, sequence, per_row, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The first chunk of a sequence (or of a row, if not ``PACKED``), and the first that is no longer its own."""
    if PACKED:
        begin = tl.load(first + sequence)
        end = tl.load(first + sequence + 1)
    else:
        begin = sequence * per_row
        end = begin + per_row
    return begin, end


@triton.jit
def load_tokens(pointer, first, count, head, heads, L: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """A head's channels of ``count`` tokens of a contiguous (tokens, H, N) tensor: (L, N) in fp32, then zeros."""
    token = tl.arange(0, L)[:, None]
    place = (first * heads + head) * N + token * (heads * N) + tl.arange(0, N)[None, :]
    return tl.load(pointer + place, mask=token < count, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(pointer, values, first, count, head, heads, L: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Write what ``load_tokens`` reads, in the dtype of ``pointer``."""
    token = tl.arange(0, L)[:, None]
    place = (first * heads + head) * N + token * (heads * N) + tl.arange(0, N)[None, :]
    tl.store(pointer + place, values.to(pointer.dtype.element_ty), mask=token < count)


@triton.jit
def load_block(pointer, block, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Matrix ``block`` (int64) of a contiguous (blocks, R, C) tensor, in the tensor's dtype."""
    place = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    return tl.load(pointer + block * (R * C) + place)


@triton.jit
def store_block(pointer, values, block, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Write what ``load_block`` reads, in the dtype of ``pointer``."""
    place = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(pointer + block * (R * C) + place, values.to(pointer.dtype.element_ty))


@triton.jit
def store_transposed(pointer, values, block, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Write a transposed matrix, (C, R), as ``store_block`` writes it."""
    place = tl.arange(0, R)[None, :] * C + tl.arange(0, C)[:, None]
    tl.store(pointer + block * (R * C) + place, values.to(pointer.dtype.element_ty))
