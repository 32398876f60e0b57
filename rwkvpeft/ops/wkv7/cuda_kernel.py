"""wkv7 in CUDA C++: in chunks of tokens where ``cuda_chunked.serves`` says so, otherwise token by token.

Token by token a block of threads has a head, with the state in registers (``cuda/wkv7/sequential.cuh``).
Letters: B batch, T tokens, H heads, N head size. Where gradients are wanted the forward keeps, in fp32, the state
before every ``SEGMENT`` tokens and what each token removed: 4 N² / SEGMENT + 4 N bytes a token and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops import cuda_build
from rwkvpeft.ops.contract import Backend, check_operands, wants_grad
from rwkvpeft.ops.opaque import opaque
from rwkvpeft.ops.sequences import Sequences, taking_sequences
from rwkvpeft.ops.wkv7 import cuda_chunked

SEGMENT = 16
"""``WKV7_SEGMENT`` of the kernels."""


def wkv7(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence; arguments as ``rwkvpeft.ops.wkv7``."""
    if cuda_chunked.serves(r, w, k, v, a, b):
        check_operands("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, {}, None if sequences else state)
        return cuda_chunked.run([r, w, k, v, a, b], state, sequences)
    return token_by_token(r=r, w=w, k=k, v=v, a=a, b=b, state=state, sequences=sequences)


def _rows(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_operands("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, {}, state)
    keep = wants_grad(r, w, k, v, a, b, state)
    operands = cuda_build.one_dtype(r, w, k, v, a, b)
    y, final = _Wkv7.apply(*operands, None if state is None else state.float(), keep)
    return y.to(v.dtype), final


token_by_token = taking_sequences("wkv7", Backend("cuda", "token by token", _rows, cuda_build.SUPPORTS))
"""The sequential kernels, whatever the call."""


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, keep: bool
) -> list[Tensor]:
    """y, the final state, and with ``keep`` the states before segments and what tokens removed."""
    results = _forward_sizes(r, w, k, v, a, b, state, keep)
    kept = results[2:] if keep else [None, None]
    state = cuda_build.aligned(state)
    cuda_build.extension().wkv7_forward(r, w, k, v, a, b, state, results[0], results[1], *kept)
    return results


def _forward_sizes(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, keep: bool
) -> list[Tensor]:
    batch, tokens, heads, size = v.shape
    results = [torch.empty_like(v), v.new_empty((batch, heads, size, size), dtype=torch.float32)]
    if keep:
        segments = -(-tokens // SEGMENT)
        results.append(v.new_empty((batch, heads, segments, size, size), dtype=torch.float32))
        results.append(torch.empty_like(v, dtype=torch.float32))
    return results


def _backward(
    dy: Tensor | None, dfinal: Tensor | None, operands: list[Tensor], kept: list[Tensor], has_state: bool,
    state_alone: bool,
) -> list[Tensor]:
    """Gradients of r, w, k, v, a, b unless ``state_alone``, and of the state if there is one."""
    grads = _backward_sizes(dy, dfinal, operands, kept, has_state, state_alone)
    dy = None if dy is None else dy.contiguous()
    dfinal = cuda_build.aligned(dfinal)
    dstate = grads[-1] if has_state else None
    of_operands = [] if state_alone else grads[:6]
    cuda_build.extension().wkv7_backward(*operands, *kept, dy, dfinal, of_operands, dstate)
    return grads


def _backward_sizes(
    dy: Tensor | None, dfinal: Tensor | None, operands: list[Tensor], kept: list[Tensor], has_state: bool,
    state_alone: bool,
) -> list[Tensor]:
    batch, _, heads, size = operands[0].shape
    dstate = [kept[0].new_empty((batch, heads, size, size))] if has_state else []
    return dstate if state_alone else [*(torch.empty_like(x) for x in operands), *dstate]


_forward_op = opaque(
    "wkv7_cuda_forward",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, bool keep) -> Tensor[]",
    _forward,
    _forward_sizes,
)
_backward_op = opaque(
    "wkv7_cuda_backward",
    "(Tensor? dy, Tensor? dfinal, Tensor[] operands, Tensor[] kept, bool has_state, bool state_alone) -> Tensor[]",
    _backward,
    _backward_sizes,
)


class _Wkv7(torch.autograd.Function):
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
        saved = list(ctx.saved_tensors)
        state_alone = not any(ctx.needs_input_grad[:6])
        grads = _backward_op(dy, dfinal, saved[:6], saved[6:], ctx.has_state, state_alone)
        dstate = grads[-1] if ctx.has_state else None
        return *((None,) * 6 if state_alone else grads[:6]), dstate, None


BACKEND = Backend(
    "cuda", "CUDA, bf16 in chunks on tensor cores, otherwise token by token", wkv7, cuda_build.SUPPORTS, packed=True,
    waits_for=cuda_build.waits_for,
)
