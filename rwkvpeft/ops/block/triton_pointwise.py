"""The squared ReLU and the gate of the channel mixing.

Of the squared ReLU only the result is kept, whose root tells enough: d relu(x)² = 2 sqrt(relu(x)²) dx. The root of a
rounded square is off by half as much as a rounded root would be.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpeft.ops.block.triton_tiles import load_row, store_row
from rwkvpeft.ops.opaque import apart

_BLOCK = 2048


@triton.jit
def _square_kernel(x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.maximum(load_row(x, 0, place, place < size), 0.0, propagate_nan=tl.PropagateNan.ALL)
    store_row(out, 0, place, place < size, row * row)


@triton.jit
def _square_backward_kernel(out, grad, grad_x, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    root = tl.sqrt(load_row(out, 0, place, inside))
    store_row(grad_x, 0, place, inside, 2.0 * root * load_row(grad, 0, place, inside))


@triton.jit
def _gate_kernel(gate, value, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    opened = tl.sigmoid(load_row(gate, 0, place, inside))
    store_row(out, 0, place, inside, opened * load_row(value, 0, place, inside))


@triton.jit
def _gate_backward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
    gate, value, grad, grad_gate, grad_value, size, BLOCK: tl.constexpr  # noqa: ANN001
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    opened = tl.sigmoid(load_row(gate, 0, place, inside))
    given = load_row(grad, 0, place, inside) * opened
    store_row(grad_value, 0, place, inside, given)
    store_row(grad_gate, 0, place, inside, given * load_row(value, 0, place, inside) * (1.0 - opened))


def _grid(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), _BLOCK),)


@torch.library.custom_op("rwkvpeft::block_squared_relu_forward", mutates_args=(), schema="(Tensor x) -> Tensor")
@apart
def squared_relu_forward(x: Tensor) -> Tensor:
    """Launch the forward kernel on a contiguous tensor."""
    out = torch.empty_like(x)
    _square_kernel[_grid(x)](x, out, x.numel(), BLOCK=_BLOCK, num_warps=8)
    return out


@squared_relu_forward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(
    "rwkvpeft::block_squared_relu_backward", mutates_args=(), schema="(Tensor out, Tensor grad) -> Tensor"
)
@apart
def squared_relu_backward(out: Tensor, grad: Tensor) -> Tensor:
    """Launch the backward kernel on contiguous tensors; ``out`` is the forward result."""
    grad_x = torch.empty_like(out)
    _square_backward_kernel[_grid(out)](out, grad, grad_x, out.numel(), BLOCK=_BLOCK, num_warps=8)
    return grad_x


@squared_relu_backward.register_fake
def _(out: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(out)


@torch.library.custom_op(
    "rwkvpeft::block_gate_value_forward", mutates_args=(), schema="(Tensor gate, Tensor value) -> Tensor"
)
@apart
def gate_value_forward(gate: Tensor, value: Tensor) -> Tensor:
    """Launch the forward kernel on contiguous tensors."""
    out = torch.empty_like(value)
    _gate_kernel[_grid(out)](gate, value, out, out.numel(), BLOCK=_BLOCK, num_warps=8)
    return out


@gate_value_forward.register_fake
def _(gate: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(value)


@torch.library.custom_op(
    "rwkvpeft::block_gate_value_backward",
    mutates_args=(),
    schema="(Tensor gate, Tensor value, Tensor grad) -> Tensor[]",
)
@apart
def gate_value_backward(gate: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """Launch the backward kernel on contiguous tensors. Returns the gradients of gate and value."""
    results = [torch.empty_like(gate), torch.empty_like(value)]
    _gate_backward_kernel[_grid(value)](gate, value, grad, *results, value.numel(), BLOCK=_BLOCK, num_warps=8)
    return results


@gate_value_backward.register_fake
def _(gate: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    return [torch.empty_like(gate), torch.empty_like(value)]


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = squared_relu_forward(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return squared_relu_backward(out, grad.contiguous())


class _GateValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return gate_value_forward(gate, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        grad_gate, grad_value = gate_value_backward(gate, value, grad.contiguous())
        return grad_gate, grad_value


def squared_relu(x: Tensor) -> Tensor:
    """See ``contract.SquaredRelu``."""
    result: Tensor = _SquaredRelu.apply(x.contiguous()) if x.numel() else x.clone()
    return result


def gate_value(receptance: Tensor, value: Tensor) -> Tensor:
    """See ``contract.GateValue``."""
    if value.numel() == 0:
        return receptance * value
    result: Tensor = _GateValue.apply(receptance.contiguous(), value.contiguous())
    return result
