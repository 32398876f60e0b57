"""wkv7 over chunks of tokens on tensor cores, in CUDA C++ (``cuda/wkv7/chunked_tiles.cuh``): a block to a head.

Letters: T tokens, H heads, N head size, n chunks of all sequences together. Where gradients are wanted the forward
keeps the state before every chunk in bf16, 2 N² / CHUNK bytes a token and head; the backward makes the rest again.
Made for many heads at once: one block walks all of a sequence's chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops import cuda_build
from rwkvpeft.ops.contract import wants_grad
from rwkvpeft.ops.opaque import opaque
from rwkvpeft.ops.sequences import Sequences

CHUNK = 16
"""``WKV7_CHUNK`` of the kernels."""
_HEAD_SIZE = 64
_BF16_PRODUCTS = (8, 0)  # the first compute capability with them


def serves(*operands: Tensor) -> bool:
    """Whether these kernels are the ones for a call: all bf16, more than one chunk, heads of 64, no older a GPU."""
    value = operands[0]
    if any(x.dtype != torch.bfloat16 for x in operands) or value.shape[-1] != _HEAD_SIZE or value.shape[1] <= CHUNK:
        return False
    return not value.is_cuda or torch.cuda.get_device_capability(value.device) >= _BF16_PRODUCTS


def run(operands: list[Tensor], state: Tensor | None, sequences: Sequences | None) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks.

    Args:
        operands: r, w, k, v, a, b, all bf16.
        state: fp32, one for each sequence, or None for zeros.
        sequences: how the row is packed; None for rows of one sequence each.
    """
    keep = wants_grad(*operands, state)
    tables = None if sequences is None else sequences.chunk_tables(CHUNK, operands[0].device)
    state = None if state is None else state.float()
    return _ChunkedWkv7.apply(*(x.contiguous() for x in operands), state, *(tables or (None, None)), keep)


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, chunks: Tensor | None,
    first: Tensor | None, keep: bool,
) -> list[Tensor]:
    """y, the final state, and with ``keep`` the states before chunks, each times a decay and in an order of its own."""
    results = _forward_sizes(r, w, k, v, a, b, state, chunks, first, keep)
    kept = results[2] if keep else None
    given = map(cuda_build.aligned, (r, w, k, v, a, b, state))
    cuda_build.extension().wkv7_chunked_forward(*given, results[0], results[1], kept, chunks, first)
    return results


def _forward_sizes(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, chunks: Tensor | None,
    first: Tensor | None, keep: bool,
) -> list[Tensor]:
    batch, tokens, heads, size = v.shape
    rows, count = batch, batch * -(-tokens // CHUNK)
    if chunks is not None and first is not None:
        rows, count = first.shape[0] - 1, chunks.shape[0]
    results = [torch.empty_like(v), v.new_empty((rows, heads, size, size), dtype=torch.float32)]
    return [*results, v.new_empty((count, heads, size, size))] if keep else results


def _backward(
    dy: Tensor | None, dfinal: Tensor | None, operands: list[Tensor], kept: Tensor, chunks: Tensor | None,
    first: Tensor | None, has_state: bool, state_alone: bool,
) -> list[Tensor]:
    """Gradients of r, w, k, v, a, b unless ``state_alone``, and of the states if there are any."""
    grads = _backward_sizes(dy, dfinal, operands, kept, chunks, first, has_state, state_alone)
    dstate = grads[-1] if has_state else None
    of_operands = [] if state_alone else grads[:6]
    given = map(cuda_build.aligned, (*operands, kept, dy, dfinal))
    cuda_build.extension().wkv7_chunked_backward(*given, of_operands, dstate, chunks, first)
    return grads


def _backward_sizes(
    dy: Tensor | None, dfinal: Tensor | None, operands: list[Tensor], kept: Tensor, chunks: Tensor | None,
    first: Tensor | None, has_state: bool, state_alone: bool,
) -> list[Tensor]:
    batch, _, heads, size = operands[0].shape
    rows = batch if first is None else first.shape[0] - 1
    dstate = [operands[0].new_empty((rows, heads, size, size), dtype=torch.float32)] if has_state else []
    return dstate if state_alone else [*(torch.empty_like(x) for x in operands), *dstate]


_forward_op = opaque(
    "wkv7_cuda_chunked_forward",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, Tensor? chunks, Tensor? first, "
    "bool keep) -> Tensor[]",
    _forward,
    _forward_sizes,
)
_backward_op = opaque(
    "wkv7_cuda_chunked_backward",
    "(Tensor? dy, Tensor? dfinal, Tensor[] operands, Tensor kept, Tensor? chunks, Tensor? first, bool has_state, "
    "bool state_alone) -> Tensor[]",
    _backward,
    _backward_sizes,
)


class _ChunkedWkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *operands, state, chunks, first, keep = arguments
        y, final, *kept = _forward_op(*operands, state, chunks, first, keep)
        if keep:
            ctx.save_for_backward(*operands, *kept, chunks, first)
        ctx.has_state = state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        *operands, kept, chunks, first = ctx.saved_tensors
        state_alone = not any(ctx.needs_input_grad[:6])
        grads = _backward_op(dy, dfinal, operands, kept, chunks, first, ctx.has_state, state_alone)
        dstate = grads[-1] if ctx.has_state else None
        return *((None,) * 6 if state_alone else grads[:6]), dstate, None, None, None
