"""wkv5 and wkv6 in Triton: the launches, as operators PyTorch takes as one call each, and their autograd.

Three passes each way: what each chunk adds to the state; the states between chunks, one after another; what tokens
read. Backwards likewise, then the gradients inside chunks. Only the second pass is serial, and it is elementwise.

Letters: B rows, S sequences (B when rows are not packed), T tokens, H heads, N head size, n chunks of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.contract import Supports
from rwkvpeft.ops.diagonal_triton_backward import gradient_kernel
from rwkvpeft.ops.diagonal_triton_forward import contribution_kernel, read_kernel, scan_kernel
from rwkvpeft.ops.opaque import opaque
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.triton_tools import dot_mode

LEVELS = 5
CHUNK = 2**LEVELS
# channels of a head that a block holds at once, (values, keys): what its registers have room for
_ADDING = (64, 32)
_READING = (64, 16)
_DIFFERENTIATING = (32, 16)
_SCANNED = 16
"""Value rows of a state that one block goes through the chunks with."""

SUPPORTS = Supports(
    device_types=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
    head_sizes=frozenset({32, 64, 128}),
)


def read_chunks(
    operator: str,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    sequences: Sequences | None,
) -> tuple[Tensor, Tensor]:
    """``operator``'s recurrence, wkv5 or wkv6; ``w`` is (B, T, H, N) or, one decay for all tokens, (H, N)."""
    tables = (None, None) if sequences is None else sequences.chunk_tables(CHUNK, v.device)
    return _Diagonal.apply(operator, r, w, k, v, u, state, *tables)


class _Diagonal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operator: str,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        u: Tensor,
        state: Tensor | None,
        table: Tensor | None,
        first: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, final, states = _CALLS[operator, "forward"](r, w, k, v, u, state, table, first)
        ctx.save_for_backward(r, w, k, v, u, states, table, first)
        ctx.operator = operator
        ctx.state_dtype = torch.float32 if state is None else state.dtype
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        r, w, k, v, u, states, table, first = ctx.saved_tensors
        if dy is None and dfinal is None:
            return (None,) * 9
        *needed, needs_state, _, _ = ctx.needs_input_grad[1:]
        inputs = any(needed)
        *grads, dstate = _CALLS[ctx.operator, "backward"](r, w, k, v, u, states, dy, dfinal, table, first, inputs)
        asked = [grad if needs else None for grad, needs in zip(grads, needed, strict=True)]
        return None, *asked, dstate.to(ctx.state_dtype) if needs_state else None, None, None


@dataclass(frozen=True)
class _Launch:
    """What the kernels of a call have in common.

    Args:
        chunks: n.
        per_row: chunks of a row; 0 when rows are packed.
        sequences: S.
        value: v, which tells the sizes.
        table, first: of ``Sequences.chunk_tables``, None when rows are not packed.
        mode: how products round their operands.
        per_head: whether decays are the same for all tokens, as wkv5's are.
    """

    chunks: int
    per_row: int
    sequences: int
    value: Tensor
    table: Tensor | None
    first: Tensor | None
    mode: str
    per_head: bool

    @classmethod
    def of(cls, r: Tensor, w: Tensor, k: Tensor, v: Tensor, table: Tensor | None, first: Tensor | None) -> _Launch:
        """The launch for these operands; ``table`` and ``first`` are those of ``Sequences.chunk_tables``, or None."""
        per_row = triton.cdiv(v.shape[1], CHUNK) if table is None else 0
        chunks = v.shape[0] * per_row if table is None else table.shape[0]
        sequences = v.shape[0] if first is None else first.shape[0] - 1
        mode = dot_mode(reduce(torch.promote_types, (r.dtype, k.dtype, v.dtype)))
        return cls(chunks, per_row, sequences, v, table, first, mode, w.dim() == 2)

    @property
    def heads(self) -> int:
        """H."""
        return self.value.shape[2]

    @property
    def size(self) -> int:
        """N."""
        return self.value.shape[3]

    def constants(self, held: tuple[int, int]) -> dict[str, Any]:
        """What a kernel over chunks is compiled for, and how; ``held`` are the values and keys it holds at once."""
        return {
            "N": self.size,
            "VALUES": min(held[0], self.size),
            "KEYS": min(held[1], self.size),
            "L": CHUNK,
            "PER_HEAD": self.per_head,
            "PACKED": self.table is not None,
            "MODE": self.mode,
            # a product gives each warp 16 rows: with more warps two do the same, which is for want of registers
            "num_warps": CHUNK // 16 * (2 if self.mode == "tf32x3" else 1),
            "num_stages": 1,
        }

    @property
    def states_dtype(self) -> torch.dtype:
        """Of the states between chunks: products round them to bf16 where they round everything."""
        return torch.bfloat16 if self.mode == "bf16" else torch.float32

    def fp32(self, *shape: int) -> Tensor:
        """Room for ``shape``."""
        return self.value.new_empty(shape, dtype=torch.float32)

    def states(self) -> Tensor:
        """Room for a state of each chunk, (n, H, N, N)."""
        return self.value.new_empty((self.chunks, self.heads, self.size, self.size), dtype=self.states_dtype)

    def scan(self, values: Tensor, keys: Tensor, w: Tensor, given: Tensor | None, backward: bool) -> list[Tensor]:
        """The first two passes: states (n, H, N, N) at the side of each chunk they enter by, and (S, H, N, N) after."""
        heads, size, constants = self.heads, self.size, self.constants(_ADDING)
        contributions = self.fp32(self.chunks, heads, size, size)
        decays = self.fp32(self.chunks, heads, size)
        states, last = self.states(), self.fp32(self.sequences, heads, size, size)
        if self.chunks and heads:
            contribution_kernel[self.chunks * heads, size // constants["VALUES"], size // constants["KEYS"]](
                values, keys, w, self.table, contributions, decays, values.shape[1], self.per_row, heads,
                BACKWARD=backward, **constants,
            )  # fmt: skip
        if self.sequences and heads:
            scan_kernel[self.sequences * heads, size // _SCANNED](
                contributions, decays, given, self.first, states, last, self.per_row, heads,
                N=size, ROWS=_SCANNED, PACKED=self.table is not None, GIVEN=given is not None, BACKWARD=backward,
                num_warps=4,
            )  # fmt: skip
        return [states, last]

    def read(
        self, r: Tensor, w: Tensor, k: Tensor, values: Tensor, u: Tensor, states: Tensor, out: Tensor, backward: bool
    ) -> None:
        """The third pass, into ``out``: y, or ``backward`` dv."""
        if not self.chunks or not self.heads:
            return
        constants = self.constants(_READING)
        read_kernel[self.chunks * self.heads, self.size // constants["VALUES"]](
            r, w, k, values, u, states, self.table, out, values.shape[1], self.per_row, self.heads, LEVELS,
            BACKWARD=backward, **constants,
        )  # fmt: skip


def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    table: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y as v, the final states (S, H, N, N) fp32, and those before each chunk (n, H, N, N)."""
    r, w, k, v, u = (x.contiguous() for x in (r, w, k, v, u))
    launch = _Launch.of(r, w, k, v, table, first)
    y = torch.empty_like(v)
    states, final = launch.scan(v, k, w, None if state is None else state.contiguous(), backward=False)
    launch.read(r, w, k, v, u, states, y, backward=False)
    return y, final, states


def _fake_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    table: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    launch = _Launch.of(r, w, k, v, table, first)
    return v.new_empty(v.shape), launch.fp32(launch.sequences, launch.heads, launch.size, launch.size), launch.states()


def _backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    states: Tensor,
    dy: Tensor | None,
    dfinal: Tensor | None,
    table: Tensor | None,
    first: Tensor | None,
    inputs: bool,
) -> tuple[Tensor, ...]:
    """Gradients of r, w, k, v, u, each as what it is of, or without elements unless ``inputs``; and of the states."""
    shapes = (r, w, k, v, u)
    r, w, k, v, u = (x.contiguous() for x in shapes)
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    launch = _Launch.of(r, w, k, v, table, first)
    grads, dstate = launch.scan(dy, r, w, None if dfinal is None else dfinal.contiguous(), backward=True)
    if not inputs:
        return *(x.new_empty(0) for x in shapes), dstate
    dv = torch.empty_like(v)
    launch.read(r, w, k, dy, u, grads, dv, backward=True)
    dr, dk = torch.empty_like(r), torch.empty_like(k)
    parts = launch.fp32(launch.chunks, launch.heads, launch.size)
    dw = torch.empty_like(parts) if launch.per_head else torch.empty_like(w)
    if launch.chunks and launch.heads:
        constants = launch.constants(_DIFFERENTIATING)
        gradient_kernel[launch.chunks * launch.heads, launch.size // constants["KEYS"]](
            r, w, k, v, u, dy, states, grads, table, dr, dw, dk, parts, v.shape[1], launch.per_row, launch.heads,
            LEVELS, **constants,
        )  # fmt: skip
    if launch.per_head:
        dw = dw.sum(0).to(w.dtype)
    return dr, dw, dk, dv, parts.sum(0).to(u.dtype), dstate


def _fake_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    states: Tensor,
    dy: Tensor | None,
    dfinal: Tensor | None,
    table: Tensor | None,
    first: Tensor | None,
    inputs: bool,
) -> tuple[Tensor, ...]:
    launch = _Launch.of(r, w, k, v, table, first)
    dstate = launch.fp32(launch.sequences, launch.heads, launch.size, launch.size)
    return *(x.new_empty(x.shape if inputs else 0) for x in (r, w, k, v, u)), dstate


_OPERANDS = "Tensor r, Tensor w, Tensor k, Tensor v, Tensor u"
_FORWARD = f"({_OPERANDS}, Tensor? state, Tensor? table, Tensor? first) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"({_OPERANDS}, Tensor states, Tensor? dy, Tensor? dfinal, Tensor? table, Tensor? first, bool inputs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_CALLS = {
    (operator, direction): opaque(f"{operator}_triton_{direction}", schema, body, fake)
    for operator in ("wkv5", "wkv6")
    for direction, schema, body, fake in (
        ("forward", _FORWARD, _forward, _fake_forward),
        ("backward", _BACKWARD, _backward, _fake_backward),
    )
}
