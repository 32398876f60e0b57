"""What every WKV backend promises, and the words a run and a backend use to find each other.

Letters: B batch, T tokens, H heads, N head size. A state is (B, H, N, N): rows are value channels, columns key
channels; float32, or float64 when an input is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvpeft.errors import ContractError

Wkv = Callable[..., tuple[Tensor, Tensor]]
"""Keyword-only operator: ``r, w, k, v, a, b, state`` for v7, ``r, w, k, v, u, state`` for v5 and v6."""


@dataclass(frozen=True)
class Needs:
    """What a run asks of an operator backend.

    Args:
        device_type: ``torch.device.type`` of the tensors, e.g. ``"cpu"``.
        dtype: of the activations.
        head_size: N.
        training: whether gradients are needed.
        batch, tokens, heads: B, T and H of a call, on which speed depends; 0 where they are not known.
        packed: whether rows hold several sequences.
    """

    device_type: str
    dtype: torch.dtype
    head_size: int
    training: bool
    batch: int = 0
    tokens: int = 0
    heads: int = 0
    packed: bool = False

    @property
    def groups(self) -> int:
        """B·H, the recurrences that can run side by side; 0 where it is not known."""
        return self.batch * self.heads


_PRECISIONS = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"
}


def _word(value: object) -> str:
    """As on the command line."""
    return _PRECISIONS.get(value, str(value)) if isinstance(value, torch.dtype) else str(value)


@dataclass(frozen=True)
class Supports:
    """What a backend can do; None means no restriction."""

    device_types: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    head_sizes: frozenset[int] | None = None
    training: bool = True

    def objections(self, needs: Needs) -> list[str]:
        """Why this backend cannot serve ``needs``, one phrase per reason; empty when it can."""
        asked = (
            ("device", needs.device_type, self.device_types),
            ("precision", needs.dtype, self.dtypes),
            ("head size", needs.head_size, self.head_sizes),
        )
        found = [
            f"{what} {_word(value)} (it can {', '.join(sorted(map(_word, allowed)))})"
            for what, value, allowed in asked
            if allowed is not None and value not in allowed
        ]
        if needs.training and not self.training:
            found.append("gradients")
        return found


@dataclass(frozen=True)
class Backend:
    """One program that computes an operator.

    Args:
        name: the value of ``--op`` that asks for it.
        summary: a few words on what it is, for the start report.
        run: the operator, keyword-only, without ``op``.
        supports: which runs it can serve.
        packed: whether ``run`` takes ``sequences`` itself; others are run on each sequence alone.
        waits_for: what must still be done before it can run, which asking for it by name does and ``auto`` does not;
            empty when nothing.
    """

    name: str
    summary: str
    run: Wkv
    supports: Supports
    packed: bool = False
    waits_for: Callable[[], str] = str


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any tensor is float64, otherwise float32: what operators calculate and keep states in."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will differentiate what is made of ``tensors``."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_operands(
    operator: str, sequences: Mapping[str, Tensor], per_head: Mapping[str, Tensor], state: Tensor | None
) -> None:
    """Check the shapes and devices of an operator's arguments.

    Args:
        sequences: arguments that must be (B, T, H, N), among them ``v``, which sets the sizes.
        per_head: arguments that must be (H, N).
        state: (B, H, N, N) or None.
    Raises:
        ContractError: a shape, a device or a dtype is not as promised; names the argument.
    """
    value = sequences["v"]
    if value.dim() != 4:
        raise ContractError(f"{operator}: v must be (B, T, H, N), found {tuple(value.shape)}")
    batch, _, heads, size = value.shape
    expected = {name: (tensor, tuple(value.shape)) for name, tensor in sequences.items()}
    expected |= {name: (tensor, (heads, size)) for name, tensor in per_head.items()}
    if state is not None:
        expected["state"] = (state, (batch, heads, size, size))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ContractError(f"{operator}: {name} must be {shape}, found {tuple(tensor.shape)}")
        if tensor.device != value.device:
            raise ContractError(f"{operator}: {name} is on {tensor.device}, v on {value.device}")
        if not tensor.is_floating_point():
            raise ContractError(f"{operator}: {name} must hold floating point numbers, found {tensor.dtype}")
