"""Prove a backend on the device it is to run on, and time it there.

The truth is the PyTorch backend in fp64 on the CPU, given the same rounded operands. Errors are relative Frobenius
norms. Letters: B batch, T tokens, H heads, N head size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rwkvpeft.ops.contract import Backend, Needs, Wkv
from rwkvpeft.registry import BACKENDS, find

TRUTH = "torch"
"""The backend others are held to."""

OPERANDS = {"wkv5": "rwkvu", "wkv6": "rwkvu", "wkv7": "rwkvab"}

_LIMITS = {
    torch.float32: {"read": 5e-5, "removal": 1e-4, "decay": 5e-4},
    torch.float16: {"read": 3e-3, "removal": 4e-3, "decay": 4e-3},
    torch.bfloat16: {"read": 5e-3, "removal": 8e-3, "decay": 8e-3},
}
"""Largest errors of outputs and ordinary gradients, of the gradients of a and b, and of the decay's, by the dtype of
the activations. In 16 bits they are little above what rounding the outputs costs."""

COARSE = 5.0
"""An error so many limits large is a fault. Between one and so many limits lies a program that is merely coarse: who
asks for it by name gets it, ``auto`` passes it over."""

_BATCH, _TOKENS, _HEADS = 2, 150, 3  # several chunks of any usual length, the last of them cut short
_WARM_UP, _REPEATS, _BUDGET_MS = 2, 10, 150.0


def sample_operands(operator: str, needs: Needs, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """Random operands as of a trained model, some channels decaying fast and some hardly; leaves that want gradients.

    Args:
        needs: their sizes and dtype; ``batch``, ``tokens`` and ``heads`` must be known.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (needs.batch, needs.tokens, needs.heads, needs.head_size)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    slow_to_fast = torch.linspace(-8, 8, needs.head_size, device=device)
    drawn = {name: draw(*shape) for name in "rkv"}
    if operator == "wkv7":
        removal = normalize(draw(*shape), dim=-1)
        gate = torch.rand(shape, generator=generator, device=device)
        drawn |= {"w": draw(*shape) + slow_to_fast, "a": -removal, "b": removal * gate}
    else:
        sizes = shape[2:] if operator == "wkv5" else shape
        drawn |= {"w": draw(*sizes) - 2 + slow_to_fast / 2, "u": draw(*shape[2:])}
    return {name: drawn[name].to(needs.dtype).requires_grad_(needs.training) for name in OPERANDS[operator]}


def errors_of(run: Wkv, operator: str, needs: Needs, device: torch.device | str) -> dict[str, float]:
    """Relative errors of ``run`` on a small problem of the run's dtype and head size.

    Returns: by name: ``y``, ``final state``, and with ``needs.training`` the gradient of every operand and of the
        state, the final state's own gradient included. A result that is not finite has an infinite error.
    """
    small = replace(needs, batch=_BATCH, tokens=_TOKENS, heads=_HEADS)
    operands = sample_operands(operator, small, "cpu")
    square = (small.batch, small.heads, small.head_size, small.head_size)
    generator = torch.Generator().manual_seed(1)
    operands["state"] = torch.randn(square, generator=generator).requires_grad_(small.training)
    # both are rounded alike: the error is the program's alone
    seeds = [torch.randn(operands["v"].shape, generator=generator).to(small.dtype),
             torch.randn(square, generator=generator)]
    truth: Backend = find(BACKENDS[operator], TRUTH, flag="--op")
    expected = _results(truth.run, operands, seeds, "cpu", torch.float64)
    found = _results(run, operands, seeds, device, None)
    return {name: relative_error(found[name], result) for name, result in expected.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, infinite where ``found`` is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _results(
    run: Wkv, operands: Mapping[str, Tensor], seeds: list[Tensor], device: torch.device | str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    moved = {
        name: tensor.detach().to(device, dtype).requires_grad_(tensor.requires_grad)
        for name, tensor in operands.items()
    }
    y, state = run(**moved)
    results = {"y": y, "final state": state}
    if operands["v"].requires_grad:
        grad_outputs = [seed.to(x) for seed, x in zip(seeds, (y, state), strict=True)]
        grads = torch.autograd.grad([y, state], list(moved.values()), grad_outputs)
        results |= {f"gradient of {name}": grad for name, grad in zip(moved, grads, strict=True)}
    return results


def limit_of(name: str, dtype: torch.dtype) -> float:
    """The largest error of the result ``name`` (as in ``errors_of``) that activations of ``dtype`` excuse."""
    kind = {"gradient of w": "decay", "gradient of a": "removal", "gradient of b": "removal"}.get(name, "read")
    return _LIMITS.get(dtype, _LIMITS[torch.float32])[kind]


def complaint(errors: Mapping[str, float], dtype: torch.dtype, slack: float = 1.0) -> str:
    """The worst error above its limit times ``slack``, in words; empty when there is none."""
    excess = {name: error / (slack * limit_of(name, dtype)) for name, error in errors.items()}
    worst = max(excess, key=excess.__getitem__)
    if not excess[worst] > 1:
        return ""
    return f"{worst} is wrong by {errors[worst]:.1e}, {slack * limit_of(worst, dtype):.0e} allowed"


def milliseconds(run: Wkv, operator: str, needs: Needs, device: torch.device) -> float:
    """Median time of forward and backward at the sizes of ``needs`` on a CUDA device."""
    operands = sample_operands(operator, needs, device)
    seed = torch.randn_like(operands["v"])

    def once() -> None:
        y, _ = run(**operands, state=None)
        if needs.training:
            torch.autograd.grad(y, list(operands.values()), seed)

    for _ in range(_WARM_UP):
        once()
    torch.cuda.synchronize(device)
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _BUDGET_MS:
        times.append(_timed(once, device))
    return statistics.median(times)


def _timed(once: Callable[[], None], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(torch.cuda.current_stream(device))
    once()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed
