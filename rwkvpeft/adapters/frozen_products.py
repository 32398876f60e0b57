"""A frozen linear and a thin trained product beside it, as one function that keeps little for its backward pass.

Left to itself, autograd keeps copies of the trained matrices in the compute dtype and adds up each gradient from parts
of its own. Here a product is added into the output in place, and so is its part of the input's gradient; kept are the
thin tensors alone and, for LoRA, the input itself, which the gradient of A needs. The frozen weight is the linear's
own business: nothing of it is kept here, and a quantised one is dequantised anew in the backward pass.

Letters: R rows (all positions of a batch), r rank; x (R, in), y (R, out).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rwkvpeft.quantization.linear import QuantizedLinear


def is_frozen(base: nn.Module) -> bool:
    """Whether ``base`` is a linear whose gradient for its input these functions know, and needs no other."""
    if isinstance(base, QuantizedLinear):
        return True
    return isinstance(base, nn.Linear) and not base.weight.requires_grad and base.bias is None


def with_lora(base: nn.Linear, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """``base(x) + scaling * (x A^T) B^T``.

    Kept for the backward pass: x, which is not copied, and x A^T (R, r).

    Args:
        base: frozen (see ``is_frozen``).
        x: (..., in).
        lora_a: (r, in), of any floating dtype; products are made in the dtype of ``base``'s output.
        lora_b: (out, r).
    Returns: (..., out).
    """
    return cast(Tensor, _WithLora.apply(x, lora_a, lora_b, scaling, base))


def with_shard(base: nn.Linear, x: Tensor, shard: Tensor) -> Tensor:
    """``base(x) + folded(x) D``, the columns of D repeated over the outputs.

    ``folded(x)`` (R, r) sums the input channels that are r apart; it is all that is kept for the backward pass.

    Args:
        base: frozen (see ``is_frozen``).
        x: (..., in).
        shard: D (r, columns), of any floating dtype; ``columns`` divides ``out``.
    Returns: (..., out).
    """
    return cast(Tensor, _WithShard.apply(x, shard, base))


class _WithLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, base: nn.Linear) -> Tensor:
        y: Tensor = base(x)
        with _without_autocast(x):
            thin = _rows(x, y.dtype) @ lora_a.to(y.dtype).T
            y = _with_product(y, thin, _scaled(lora_b, scaling, y.dtype).T)
        wants_a, wants_b = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if wants_a else None, thin if wants_b else None, lora_a, lora_b)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.base, ctx.dtype = scaling, base, x.dtype
        ctx.in_shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if grad is None:
            return (None,) * 5
        x, thin, lora_a, lora_b = ctx.saved_tensors
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        grad_x = grad_a = grad_b = None
        with _without_autocast(grad):
            grad = _flat(grad)
            if wants_x or wants_a:
                grad_thin = grad @ _scaled(lora_b, ctx.scaling, grad.dtype)
            if wants_x:
                grad_x = _through_base(ctx.base, grad).addmm_(grad_thin, lora_a.to(grad.dtype))
                grad_x = grad_x.view(ctx.in_shape).to(ctx.dtype)
            if wants_a:
                grad_a = (grad_thin.T @ _rows(x, grad.dtype)).to(lora_a.dtype)
            if wants_b:
                grad_b = _scaled(grad.T @ thin, ctx.scaling, lora_b.dtype)
        return grad_x, grad_a, grad_b, None, None


class _WithShard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Tensor, base: nn.Linear) -> Tensor:
        y: Tensor = base(x)
        rank, columns = shard.shape
        with _without_autocast(x):
            folded = fold(_rows(x, y.dtype), rank)
            if columns == y.shape[-1]:
                y = _with_product(y, folded, shard.to(y.dtype))
            else:
                y = _with_repeated(y, folded @ shard.to(y.dtype))
        ctx.save_for_backward(folded if ctx.needs_input_grad[1] else None, shard)
        ctx.set_materialize_grads(False)
        ctx.base, ctx.dtype = base, x.dtype
        ctx.in_shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if grad is None:
            return None, None, None
        folded, shard = ctx.saved_tensors
        columns = shard.shape[1]
        grad_x = grad_shard = None
        with _without_autocast(grad):
            grad = _flat(grad)
            of_columns = grad if columns == grad.shape[1] else grad.unflatten(1, (-1, columns)).sum(1)
            if ctx.needs_input_grad[0]:
                grad_x = _through_base(ctx.base, grad)
                _add_unfolded(grad_x, of_columns @ shard.to(grad.dtype).T)
                grad_x = grad_x.view(ctx.in_shape).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                grad_shard = (folded.T @ of_columns).to(shard.dtype)
        return grad_x, grad_shard, None


def fold(x: Tensor, rank: int) -> Tensor:
    """The sums (R, rank) of the channels of ``x`` (R, in) that are ``rank`` apart; the last ones may be fewer."""
    whole = x.shape[1] // rank * rank
    sums = x[:, :whole].unflatten(1, (-1, rank)).sum(1)
    if whole < x.shape[1]:
        sums[:, : x.shape[1] - whole] += x[:, whole:]
    return sums


def _add_unfolded(x: Tensor, sums: Tensor) -> None:
    """Add to each channel of ``x`` (R, in) the sum it went into."""
    rank = sums.shape[1]
    whole = x.shape[1] // rank * rank
    x[:, :whole].unflatten(1, (-1, rank)).add_(sums[:, None])
    if whole < x.shape[1]:
        x[:, whole:].add_(sums[:, : x.shape[1] - whole])


def _with_product(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``y`` (..., out) + ``left`` (R, k) ``right`` (k, out), in the place of ``y`` where nobody else has it."""
    if _is_watched():
        return _shaped(torch.addmm(_rows_of(y), left, right), y)
    _rows_of(y).addmm_(left, right)
    return y


def _with_repeated(y: Tensor, sums: Tensor) -> Tensor:
    """``y`` (..., out) + ``sums`` (R, columns) repeated over the outputs, in the place of ``y`` where nobody else has
    it."""
    groups = _rows_of(y).unflatten(1, (-1, sums.shape[1]))
    if _is_watched():
        return _shaped(groups + sums[:, None], y)
    groups.add_(sums[:, None])
    return y


def _shaped(made: Tensor, y: Tensor) -> Tensor:
    """``made``, which nobody else has, in the shape of ``y``: no view, so that what comes after may write to it."""
    return cast(Tensor, torch.ops.aten._unsafe_view.default(made, y.shape))


def _is_watched() -> bool:
    """Whether something watches every operator: selective checkpointing keeps the very tensor that a product returned,
    which must not change then."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def _through_base(base: nn.Linear, grad: Tensor) -> Tensor:
    """The gradient (R, in) of ``base``'s input from that of its output."""
    if isinstance(base, QuantizedLinear):
        return grad @ base.dequantized(grad.dtype)
    return grad @ base.weight.to(grad.dtype)


def _scaled(matrix: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """A product and a cast at once."""
    return torch.mul(matrix, scaling, out=torch.empty_like(matrix, dtype=dtype))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor


def _rows_of(y: Tensor) -> Tensor:
    """``y`` itself as (R, out), to be written to: never a copy, as ``reshape`` may make."""
    return y.view(-1, y.shape[-1])


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _flat(x).to(dtype)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """What is inside has chosen its dtypes: half of a product must not be cast to others."""
    device_type = tensor.device.type
    # tensors without data are of a device that has none
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()
