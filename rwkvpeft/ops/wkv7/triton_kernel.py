"""wkv7 in Triton: chunks of a sequence side by side, forward and backward in three passes each.

Letters: B batch, T tokens, H heads, N head size, L tokens of a chunk; S state at a chunk's start, (N values, N keys);
c_t the sum of a chunk's log decays up to and including token t, m its value at the chunk's middle, c_L at its end.

Every factor of a chunk stands relative to its middle:

    R_t = r_t e^(c_t - m)    A_t = a_t e^(c_(t-1) - m)    K_s = k_s e^(m - c_s)    B_s = b_s e^(m - c_s)
    start = e^m              end = e^(c_L - m)            S' = S diag(start)

    A_rk = R Kᵀ, A_rb = R Bᵀ where s <= t;  A_ak = A Kᵀ, A_ab = A Bᵀ where s < t;  M = (I - A_ab)^-1
    W = M A                  U0 = M A_ak V
    Q = R + A_rb W           Y0 = A_rb U0 + A_rk V        y = Q S'ᵀ + Y0
    E = Wᵀ B                 C = U0ᵀ B + Vᵀ K             S <- (S' + S' E + C) diag(end)

With G the gradient of the state a chunk leaves, G' = G diag(end), D = dYᵀ Q:

    G <- (G' + G' Eᵀ + D) diag(start)
    U = M (A S'ᵀ + A_ak V)   dX = Mᵀ (A_rbᵀ dY + B G'ᵀ)   dV = A_rkᵀ dY + A_akᵀ dX + K G'ᵀ

Source: the WY form of "RWKV-7 Goose" (arXiv 2503.14456), appendix on parallel training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.contract import Backend, Supports, check_operands
from rwkvpeft.ops.opaque import apart
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.wkv7.triton_backward import backward
from rwkvpeft.ops.wkv7.triton_forward import Plan, chunk_length, forward


def wkv7(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv7``."""
    if sequences is None:
        check_operands("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, {}, state)
        tables: tuple[Tensor | None, Tensor | None] = (None, None)
    else:
        sequences.check("wkv7", v, state)
        tables = sequences.chunk_tables(chunk_length(v.shape[-1], v.dtype), v.device)
    return _Wkv7.apply(r, w, k, v, a, b, state, *tables)


@torch.library.custom_op(
    "rwkvpeft::wkv7_triton_forward",
    mutates_args=(),
    schema="(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, Tensor? table, Tensor? first)"
    " -> (Tensor, Tensor, Tensor)",
)
@apart
def wkv7_triton_forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
    table: Tensor | None, first: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``triton_forward.forward`` for tensors of any strides."""
    r, w, k, v, a, b = (x.contiguous() for x in (r, w, k, v, a, b))
    return forward(r, w, k, v, a, b, None if state is None else state.float().contiguous(), table, first)


@wkv7_triton_forward.register_fake
def _(r, w, k, v, a, b, state, table, first):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    plan = Plan.of(v, table, first)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = v.new_empty(plan.sequences, plan.heads, plan.size, plan.size, dtype=torch.float32)
    return y, final, plan.blocks(v, plan.size, plan.size, dtype=plan.narrow)


@torch.library.custom_op(
    "rwkvpeft::wkv7_triton_backward",
    mutates_args=(),
    schema="(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor states, Tensor? dy, Tensor? dfinal,"
    " Tensor? table, Tensor? first, bool operands) -> Tensor[]",
)
@apart
def wkv7_triton_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, states: Tensor, dy: Tensor | None,
    dfinal: Tensor | None, table: Tensor | None, first: Tensor | None, operands: bool,
) -> list[Tensor]:
    """``triton_backward.backward`` for tensors of any strides: dstate, and if ``operands`` theirs behind it."""
    r, w, k, v, a, b = (x.contiguous() for x in (r, w, k, v, a, b))
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    grads, dstate = backward(r, w, k, v, a, b, states, dy, dfinal, table, first, operands=operands)
    return [dstate, *grads]


@wkv7_triton_backward.register_fake
def _(r, w, k, v, a, b, states, dy, dfinal, table, first, operands):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    plan = Plan.of(v, table, first)
    dstate = v.new_empty(plan.sequences, plan.heads, plan.size, plan.size, dtype=torch.float32)
    wanted = (r, w, k, v, a, b) if operands else ()
    return [dstate, *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted)]


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
        table: Tensor | None, first: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, final, states = wkv7_triton_forward(r, w, k, v, a, b, state, table, first)
        ctx.save_for_backward(r, w, k, v, a, b, states, table, first)
        ctx.state_dtype = None if state is None else state.dtype
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        r, w, k, v, a, b, states, table, first = ctx.saved_tensors
        operands = any(ctx.needs_input_grad[:6])
        dstate, *grads = wkv7_triton_backward(r, w, k, v, a, b, states, dy, dfinal, table, first, operands)
        if not operands:
            grads = [None] * 6
        return *grads, dstate.to(ctx.state_dtype) if ctx.needs_input_grad[6] else None, None, None


BACKEND = Backend(
    "triton",
    "chunks side by side",
    wkv7,
    Supports(
        device_types=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
        head_sizes=frozenset({64, 128}),
    ),
    packed=True,
)
