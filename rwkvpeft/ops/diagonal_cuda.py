"""wkv5 and wkv6 token by token in CUDA C++, the state in registers (``cuda/common/diagonal.cuh``).

Letters: B batch, T tokens, H heads, N head size. Where gradients are wanted the forward keeps, in fp32, the state
before every ``SEGMENT`` tokens: 4 N² / SEGMENT bytes a token and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops import cuda_build
from rwkvpeft.ops.contract import wants_grad
from rwkvpeft.ops.opaque import opaque

SEGMENT = 16
"""``DIAGONAL_SEGMENT`` of the kernels."""
_ASIDE = 3
"""``DIAGONAL_SCRATCH``: the states of a segment that the backward puts aside."""


def read_tokens(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence of ``rwkvpeft.ops.wkv6``, or of ``wkv5`` where ``w`` is (H, N)."""
    keep = wants_grad(r, w, k, v, u, state)
    if w.dim() == 2:
        rows = cuda_build.one_dtype(r, k, v)
        operands = [rows[0], w.float().contiguous(), *rows[1:]]
    else:
        operands = cuda_build.one_dtype(r, w, k, v)
    state = None if state is None else state.float()
    y, final = _Diagonal.apply(*operands, u.float().contiguous(), state, keep)
    return y.to(v.dtype), final


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, keep: bool
) -> list[Tensor]:
    """y, the final state, and with ``keep`` the states before segments."""
    results = _forward_sizes(r, w, k, v, u, state, keep)
    kernels = cuda_build.extension()
    run = kernels.wkv5_forward if w.dim() == 2 else kernels.wkv6_forward
    run(r, w, k, v, u, cuda_build.aligned(state), results[0], results[1], results[2] if keep else None)
    return results


def _forward_sizes(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, keep: bool
) -> list[Tensor]:
    batch, tokens, heads, size = v.shape
    results = [torch.empty_like(v), u.new_empty((batch, heads, size, size))]
    if keep:
        results.append(u.new_empty((batch, heads, -(-tokens // SEGMENT), size, size)))
    return results


def _backward(
    dy: Tensor | None, dfinal: Tensor | None, operands: list[Tensor], checkpoints: Tensor, has_state: bool,
    state_alone: bool,
) -> list[Tensor]:
    """Gradients of r, w, k, v, u unless ``state_alone``, and of the state if there is one."""
    r, w, k, v, u = operands
    batch, _, heads, size = r.shape
    constant = w.dim() == 2
    dstate = checkpoints.new_empty((batch, heads, size, size)) if has_state else None
    grads = []
    if not state_alone:
        # a row of the batch its own sums, added below in the same order every time
        dw = u.new_empty((batch, heads, size)) if constant else torch.empty_like(w)
        du = u.new_empty((batch, heads, size))
        grads = [torch.empty_like(r), dw, torch.empty_like(k), torch.empty_like(v), du]
    scratch = None if state_alone else u.new_empty((batch, heads, _ASIDE, size, size))
    dy = None if dy is None else dy.contiguous()
    dfinal = cuda_build.aligned(dfinal)
    kernels = cuda_build.extension()
    run = kernels.wkv5_backward if constant else kernels.wkv6_backward
    run(*operands, checkpoints, dy, dfinal, grads, scratch, dstate)
    if grads:
        grads[4] = grads[4].sum(0)
        if constant:
            grads[1] = grads[1].sum(0)
    return grads if dstate is None else [*grads, dstate]


def _backward_sizes(
    dy: Tensor | None, dfinal: Tensor | None, operands: list[Tensor], checkpoints: Tensor, has_state: bool,
    state_alone: bool,
) -> list[Tensor]:
    batch, _, heads, size = operands[0].shape
    dstate = [checkpoints.new_empty((batch, heads, size, size))] if has_state else []
    return dstate if state_alone else [*(torch.empty_like(x) for x in operands), *dstate]


_forward_op = opaque(
    "wkv_diagonal_cuda_forward",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, Tensor? state, bool keep) -> Tensor[]",
    _forward,
    _forward_sizes,
)
_backward_op = opaque(
    "wkv_diagonal_cuda_backward",
    "(Tensor? dy, Tensor? dfinal, Tensor[] operands, Tensor checkpoints, bool has_state, bool state_alone) -> Tensor[]",
    _backward,
    _backward_sizes,
)


class _Diagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *operands, state, keep = arguments
        y, final, *kept = _forward_op(*operands, state, keep)
        if keep:
            ctx.save_for_backward(*operands, *kept)
        ctx.has_state = state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        *operands, checkpoints = ctx.saved_tensors
        state_alone = not any(ctx.needs_input_grad[:5])
        grads = _backward_op(dy, dfinal, operands, checkpoints, ctx.has_state, state_alone)
        dstate = grads[-1] if ctx.has_state else None
        return *((None,) * 5 if state_alone else grads[:5]), dstate, None
