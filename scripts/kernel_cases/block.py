"""A block's operators, forward and backward, at the widths of 0.1B, 1.5B and 7B models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.ops.block.contract import KeyParameters, Norm
from rwkvpeft.ops.block.triton_ops import TRITON
from rwkvpeft.ops.sequences import Sequences

BATCH, TOKENS = 2, 64


class Sizes(NamedTuple):
    """``trained``: whether the parameters are."""

    channels: int
    head_size: int
    dtype: torch.dtype
    trained: bool

    def tokens(self, *more: int) -> Tensor:
        return torch.zeros(*more, BATCH, TOKENS, self.channels, dtype=self.dtype, requires_grad=True)

    def heads(self) -> Tensor:
        return self.tokens().unflatten(-1, (-1, self.head_size))

    def parameter(self) -> Tensor:
        return torch.zeros(self.channels, requires_grad=self.trained)

    def last(self) -> Tensor:
        return torch.zeros(BATCH, self.channels, dtype=self.dtype, requires_grad=True)

    def norm(self) -> Norm:
        return Norm(self.parameter(), self.parameter(), 1e-5)


def differentiate(outputs: Iterable[Tensor | None]) -> None:
    """The backward pass of everything that has one."""
    roots = [output for output in outputs if output is not None and output.requires_grad]
    torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])


def norm_mix(sizes: Sizes, mixes: int, rest: bool) -> None:
    """``rest``: with an update to add and a token carried over."""
    shares: tuple[Tensor | None, ...] = tuple(sizes.parameter() for _ in range(mixes))
    update, last = (sizes.tokens(), sizes.last()) if rest else (None, None)
    mixed = TRITON.norm_mix(sizes.tokens(), update, sizes.norm(), last, shares)
    differentiate([mixed.residual, mixed.last, *mixed.tokens])


def packed(sizes: Sizes, mixes: int, rest: bool) -> None:
    """A packed row of two sequences."""
    sequences = Sequences([BATCH * TOKENS - 3, 3])
    row = sizes.tokens().reshape(1, -1, sizes.channels)
    update, last = (torch.zeros_like(row), sizes.last()) if rest else (None, None)
    shares: tuple[Tensor | None, ...] = tuple(sizes.parameter() for _ in range(mixes))
    mixed = TRITON.norm_mix(row, update, sizes.norm(), last, shares, sequences)
    differentiate([mixed.residual, mixed.last, *mixed.tokens])
    if mixes == 1:
        mixes_by_token = tuple(sizes.parameter() for _ in range(5))
        own = sizes.tokens(5).reshape(5, 1, -1, sizes.channels)
        differentiate(TRITON.mix_by_token(row, None, last, own, mixes_by_token, sequences))


def norm_mix_v6(sizes: Sizes) -> None:
    mixed = TRITON.norm_mix(sizes.tokens(), None, sizes.norm(), None, (None, sizes.parameter()))
    differentiate([mixed.residual, mixed.last, *mixed.tokens])


def mix_by_token(sizes: Sizes, rest: bool) -> None:
    mixes = tuple(sizes.parameter() for _ in range(5))
    differentiate(TRITON.mix_by_token(sizes.tokens(), None, sizes.last() if rest else None, sizes.tokens(5), mixes))


def prepare_keys(sizes: Sizes, first: bool) -> None:
    parameters = KeyParameters(*(sizes.parameter() for _ in range(4)))
    earlier = (None, None) if first else (sizes.tokens(), sizes.tokens())
    inputs = (sizes.tokens() for _ in range(3))
    differentiate(TRITON.prepare_keys(*inputs, *earlier, parameters, sizes.channels // sizes.head_size))


def norm_bonus_gate(sizes: Sizes) -> None:
    inputs = (sizes.heads() for _ in range(4))
    scales = sizes.parameter().unflatten(0, (-1, sizes.head_size))
    differentiate([TRITON.norm_bonus_gate(*inputs, sizes.tokens(), sizes.norm(), scales)])


def norm_gate(sizes: Sizes) -> None:
    differentiate([TRITON.norm_gate(sizes.heads(), sizes.tokens(), sizes.norm())])


def pointwise(sizes: Sizes) -> None:
    differentiate([TRITON.squared_relu(sizes.tokens()), TRITON.gate_value(sizes.tokens(), sizes.tokens())])


def _cases() -> dict[str, Callable[[], object]]:
    cases: dict[str, Callable[[], object]] = {}
    for channels, head_size in ((768, 64), (2048, 64), (4096, 64), (4096, 128)):
        for dtype, trained in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
            sizes = Sizes(channels, head_size, dtype, trained)
            name = f"{channels}/{head_size} {str(dtype)[6:]} {'trained' if trained else 'frozen'}"
            # v7's two, v5's, and the channel mixing of v5 and v6, with and without what is optional
            cases |= {f"{name} mix {count}{'+' if rest else ''}": partial(norm_mix, sizes, count, rest)
                      for count in (6, 4, 2, 1) for rest in (False, True)}
            cases |= {f"{name} packed {count}{'+' if rest else ''}": partial(packed, sizes, count, rest)
                      for count in (6, 4, 2, 1) for rest in (False, True)}
            cases |= {
                f"{name} v6": partial(norm_mix_v6, sizes),
                f"{name} by token": partial(mix_by_token, sizes, False),
                f"{name} by token+": partial(mix_by_token, sizes, True),
                f"{name} keys": partial(prepare_keys, sizes, False),
                f"{name} keys, layer 0": partial(prepare_keys, sizes, True),
                f"{name} bonus": partial(norm_bonus_gate, sizes),
                f"{name} gate": partial(norm_gate, sizes),
                f"{name} pointwise": partial(pointwise, sizes),
            }
    return cases


CASES = _cases()
