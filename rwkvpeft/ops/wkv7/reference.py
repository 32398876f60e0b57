"""wkv7 one token at a time, differentiated by autograd: slow, and the truth other backends are held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rwkvpeft.ops.contract import Backend, Supports, check_operands, compute_dtype


def wkv7(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as written; arguments as ``rwkvpeft.ops.wkv7``."""
    check_operands("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, {}, state)
    dtype = compute_dtype(r, w, k, v, a, b, state)
    batch, tokens, heads, size = v.shape
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w.to(dtype)))
    receptance, key, value, removal, write = (x.to(dtype) for x in (r, k, v, a, b))
    memory = v.new_zeros(batch, heads, size, size, dtype=dtype) if state is None else state.to(dtype)
    read = []
    for t in range(tokens):
        removed = torch.einsum("bhij,bhj->bhi", memory, removal[:, t])
        memory = (
            memory * decay[:, t, :, None, :]
            + removed[..., :, None] * write[:, t, :, None, :]
            + value[:, t, :, :, None] * key[:, t, :, None, :]
        )
        read.append(torch.einsum("bhij,bhj->bhi", memory, receptance[:, t]))
    y = torch.stack(read, 1) if read else value
    return y.to(v.dtype), memory


BACKEND = Backend("reference", "one token at a time, for checking", wkv7, Supports())
