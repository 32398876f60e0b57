"""WKV7 in Triton, as ``rwkvpeft.ops.wkv7.triton_kernel`` launches it."""

from __future__ import annotations

from functools import partial

import torch

from rwkvpeft.ops import Sequences
from rwkvpeft.ops.wkv7.triton_backward import backward
from rwkvpeft.ops.wkv7.triton_forward import chunk_length, forward


def run(dtype: torch.dtype, size: int, packed: bool = False, state: bool = True) -> None:
    operands = [torch.randn(1, 70, 2, size, dtype=dtype) for _ in range(6)]
    tables = (None, None)
    if packed:
        tables = Sequences([30, 40]).chunk_tables(chunk_length(size, dtype), torch.device("cpu"))
    initial = torch.randn(2 if packed else 1, 2, size, size) if state else None
    y, final, states = forward(*operands, initial, *tables)
    backward(*operands, states, y, final if state else None, *tables, operands=True)


CASES = {
    "bf16 N=64": partial(run, torch.bfloat16, 64),
    "fp16 N=64": partial(run, torch.float16, 64),
    "fp32 N=64": partial(run, torch.float32, 64),
    "bf16 N=128": partial(run, torch.bfloat16, 128),
    "packed": partial(run, torch.bfloat16, 64, packed=True, state=False),
}
