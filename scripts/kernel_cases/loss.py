"""Rows of logits in Triton, as the loss launches them: of RWKV's vocabulary, and of an odd one."""

from __future__ import annotations

from functools import partial

import torch

from rwkvpeft.ops.cross_entropy_torch import Trained
from rwkvpeft.ops.cross_entropy_triton import rows

ROWS = 4


def run(dtype: torch.dtype, vocabulary: int, *, gradient: bool, top: bool, smoothing: float = 0.0) -> None:
    trained = Trained(torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS), smoothing)
    rows(torch.zeros(ROWS, vocabulary, dtype=dtype), trained, gradient=gradient, top=top)


def largest(dtype: torch.dtype, vocabulary: int) -> None:
    rows(torch.zeros(ROWS, vocabulary, dtype=dtype), None, gradient=False, top=True)


CASES = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for vocabulary in (65536, 50277):
        name = f"{str(dtype)[6:]} {vocabulary}"
        CASES[f"{name} trained"] = partial(run, dtype, vocabulary, gradient=True, top=True)
        CASES[f"{name} no penalty"] = partial(run, dtype, vocabulary, gradient=True, top=False)
        CASES[f"{name} smoothed"] = partial(run, dtype, vocabulary, gradient=True, top=True, smoothing=0.1)
        CASES[f"{name} evaluated"] = partial(run, dtype, vocabulary, gradient=False, top=False)
        CASES[f"{name} untrained"] = partial(largest, dtype, vocabulary)
