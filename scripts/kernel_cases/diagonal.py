"""wkv5 and wkv6, forward and backward."""

from __future__ import annotations

from functools import partial

import torch

from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.wkv5.triton_kernel import wkv5
from rwkvpeft.ops.wkv6.triton_kernel import wkv6


def case(operator, dtype, size, packed=False):
    shape = (1, 130, 2, size)
    r, k, v = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    w = torch.zeros(shape if operator is wkv6 else shape[2:], requires_grad=True)
    u = torch.zeros(shape[2:], dtype=dtype)
    sequences = Sequences([100, 30]) if packed else None
    state = torch.zeros(2 if packed else 1, 2, size, size)
    y, final = operator(r=r, w=w, k=k, v=v, u=u, state=state, sequences=sequences)
    torch.autograd.backward([y, final], [torch.zeros_like(y), torch.zeros_like(final)])


CASES = {
    "wkv6 bf16 64": partial(case, wkv6, torch.bfloat16, 64),
    "wkv6 bf16 64 packed": partial(case, wkv6, torch.bfloat16, 64, True),
    "wkv6 fp32 64": partial(case, wkv6, torch.float32, 64),
    "wkv6 fp16 64": partial(case, wkv6, torch.float16, 64),
    "wkv6 bf16 128": partial(case, wkv6, torch.bfloat16, 128),
    "wkv6 fp32 128": partial(case, wkv6, torch.float32, 128),
    "wkv6 bf16 32": partial(case, wkv6, torch.bfloat16, 32),
    "wkv5 bf16 64": partial(case, wkv5, torch.bfloat16, 64),
}
