"""Prove a block's operators on the device they are to run on.

The truth is plain PyTorch in fp64 on the CPU, given the same rounded inputs. Errors are relative Frobenius norms.
Letters: B batch, T tokens, C channels, H heads, N head size, S sequences of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.ops.bench import GpuLost, first_line, surviving
from rwkvpeft.ops.block.contract import BlockOps, KeyParameters, Norm
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.contract import Needs
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.trial import relative_error

_LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
"""Largest errors; what rounding the results to 16 bits costs is a fifth of theirs."""

_BATCH, _TOKENS, _HEADS = 2, 37, 3
_PACKED = 4
"""Sequences of a packed row."""
_EPS = 1e-5


class Call(NamedTuple):
    """How to call an operator: a letter for each tensor it takes (see ``draw``), and the call itself."""

    inputs: str
    run: Callable[..., tuple[Tensor | None, ...]]


def _norm_mix(ops: BlockOps, x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, last: Tensor,
              *mixes: Tensor) -> tuple[Tensor | None, ...]:
    mixed = ops.norm_mix(x, update, Norm(weight, bias, _EPS), last, mixes)
    return mixed.residual, mixed.last, *mixed.tokens


def _mix_by_token(ops: BlockOps, x: Tensor, last: Tensor, shares: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    return ops.mix_by_token(x, None, last, shares, mixes)


def _packed(x: Tensor) -> Sequences:
    """All tokens of (.., B, T, C) in sequences of unequal length, one of them empty."""
    total = x.shape[-3] * x.shape[-2]
    first = min(1, total)
    third = (total - first) // 3
    return Sequences((first, 0, third, total - first - third))


def _norm_mix_packed(ops: BlockOps, x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, last: Tensor,
                     *mixes: Tensor) -> tuple[Tensor | None, ...]:
    row, more = (part.reshape(1, -1, part.shape[-1]) for part in (x, update))
    mixed = ops.norm_mix(row, more, Norm(weight, bias, _EPS), last, mixes, _packed(x))
    return mixed.residual, mixed.last, *mixed.tokens


def _mix_by_token_packed(
    ops: BlockOps, x: Tensor, last: Tensor, shares: Tensor, *mixes: Tensor
) -> tuple[Tensor, ...]:
    row, own = x.reshape(1, -1, x.shape[-1]), shares.reshape(5, 1, -1, x.shape[-1])
    return ops.mix_by_token(row, None, last, own, mixes, _packed(x))


def _prepare_keys(ops: BlockOps, reference: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    key, value, rate, first, share, *parameters = tensors
    return ops.prepare_keys(key, value, rate, first, share, KeyParameters(*parameters), reference.shape[0])


def _norm_bonus_gate(ops: BlockOps, scales: Tensor, weight: Tensor, bias: Tensor, *tensors: Tensor) -> tuple[Tensor]:
    read, r, k, v, gate = tensors
    return (ops.norm_bonus_gate(read, r, k, v, gate, Norm(weight, bias, _EPS), scales),)


def _norm_gate(ops: BlockOps, read: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (ops.norm_gate(read, gate, Norm(weight, bias, _EPS)),)


CALLS = {
    "norm_mix": Call("xxccl" + "pppppp", _norm_mix),
    "norm_mix of packed rows": Call("xxccq" + "pppppp", _norm_mix_packed),
    "mix_by_token": Call("xls" + "ppppp", _mix_by_token),
    "mix_by_token of packed rows": Call("xqs" + "ppppp", _mix_by_token_packed),
    "prepare_keys": Call("k" + "xxxxx" + "pppp", _prepare_keys),
    "norm_bonus_gate": Call("kcc" + "hhhhx", _norm_bonus_gate),
    "norm_gate": Call("hxcc", _norm_gate),
    "squared_relu": Call("x", lambda ops, x: (ops.squared_relu(x),)),
    "gate_value": Call("xx", lambda ops, gate, value: (ops.gate_value(gate, value),)),
}
"""Every operator at its fullest."""


def draw(
    inputs: str, dtype: torch.dtype, *, heads: int, head_size: int, batch: int = _BATCH, tokens: int = _TOKENS
) -> list[Tensor]:
    """Random tensors for a call, leaves that want gradients, always the same.

    Letters: x (B, T, C), h (B, T, H, N), l (B, C), q (S, C), s (5, B, T, C) in ``dtype``; parameters c (C,),
    p (1, 1, C) and k (H, N) in fp32.
    """
    generator = torch.Generator().manual_seed(0)
    channels = heads * head_size
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, tokens, channels), "h": (batch, tokens, heads, head_size), "l": (batch, channels),
        "q": (_PACKED, channels),
        "s": (5, batch, tokens, channels), "c": (channels,), "p": (1, 1, channels), "k": (heads, head_size),
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        torch.randn(shapes[letter], generator=generator).to(wide if letter in "cpk" else dtype).requires_grad_()
        for letter in inputs
    ]


def results_of(ops: BlockOps, call: Call, inputs: list[Tensor]) -> list[Tensor]:
    """What the operator gives, then the gradient of each input that wants one, for random gradients of its results."""
    outputs = [output for output in call.run(ops, *inputs) if output is not None]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    # the residual stream has no gradient where tokens are frozen
    roots = [(output, seed) for output, seed in zip(outputs, seeds, strict=True) if output.requires_grad]
    wanting = [tensor for tensor in inputs if tensor.requires_grad]
    if not roots:
        return outputs
    grads = torch.autograd.grad([root for root, _ in roots], wanting, [seed for _, seed in roots], allow_unused=True)
    return [*outputs, *(grad for grad in grads if grad is not None)]


def objection(ops: BlockOps, needs: Needs, device: torch.device | str) -> str:
    """Why the operators cannot be trusted on this device, in a few words; empty when they compute what they should.

    Raises: GpuLost if trying them made the device unusable.
    """
    heads = max(needs.heads, _HEADS)
    for name, call in CALLS.items():
        inputs = draw(call.inputs, needs.dtype, heads=heads, head_size=needs.head_size, tokens=_TOKENS)
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        try:
            with surviving(device, "--fused_kernel", "--fused_kernel false"):
                found = results_of(ops, call, [tensor.detach().to(device).requires_grad_() for tensor in inputs])
        except GpuLost:
            raise
        except Exception as reason:  # noqa: BLE001 a compiler or a driver may fail in any way
            return f"{name} fails: {first_line(reason)}"
        expected = results_of(PLAIN, call, wide)
        error = max(relative_error(*pair) for pair in zip(found, expected, strict=True))
        if not error < _LIMITS.get(needs.dtype, _LIMITS[torch.float32]):
            return f"{name} is off by {error:.0e}"
    return ""
