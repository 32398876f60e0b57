"""A block's operators, forward and backward, at the widths of 0.1B, 1.5B and 7B models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rwkvpeft.ops.block.contract import Norm
from rwkvpeft.ops.block import triton_norm_mix

BATCH, TOKENS = 2, 64


def differentiate(outputs: Iterable[Tensor | None]) -> None:
    """The backward pass of everything that has one."""
    roots = [output for output in outputs if output is not None and output.requires_grad]
    torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])


def norm_mix(channels: int, dtype: torch.dtype, *, mixes: int, trained: bool, rest: bool) -> None:
    """``rest``: with an update to add and a token carried over."""
    def tokens() -> Tensor:
        return torch.zeros(BATCH, TOKENS, channels, dtype=dtype, requires_grad=True)

    def parameter() -> Tensor:
        return torch.zeros(channels, requires_grad=trained)

    last = torch.zeros(BATCH, channels, dtype=dtype, requires_grad=True) if rest else None
    norm = Norm(parameter(), parameter(), 1e-5)
    shares: tuple[Tensor | None, ...] = tuple(parameter() for _ in range(mixes))
    mixed = triton_norm_mix.norm_mix(tokens(), tokens() if rest else None, norm, last, shares)
    differentiate([mixed.residual, mixed.last, *mixed.tokens])


def _cases() -> dict[str, Callable[[], object]]:
    cases: dict[str, Callable[[], object]] = {}
    for channels in (768, 2048, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            for trained in (False, True):
                name = f"{channels} {str(dtype)[6:]} {'trained' if trained else 'frozen'}"
                for mixes, rest in ((6, True), (6, False), (1, True), (2, True)):
                    def run(channels=channels, dtype=dtype, trained=trained, mixes=mixes, rest=rest) -> None:
                        norm_mix(channels, dtype, mixes=mixes, trained=trained, rest=rest)

                    cases[f"{name} {mixes}{'+' if rest else ''}"] = run
    return cases


CASES = _cases()
