"""wkv5 one token at a time, differentiated by autograd: slow, and the truth other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvpeft.ops.contract import Backend, Supports, check_operands, compute_dtype


def wkv5(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as written; arguments as ``rwkvpeft.ops.wkv5``."""
    check_operands("wkv5", {"r": r, "k": k, "v": v}, {"w": w, "u": u}, state)
    dtype = compute_dtype(r, w, k, v, u, state)
    batch, tokens, heads, size = v.shape
    decay = torch.exp(-torch.exp(w.to(dtype)))[:, None, :]
    receptance, key, value, bonus = (x.to(dtype) for x in (r, k, v, u))
    memory = v.new_zeros(batch, heads, size, size, dtype=dtype) if state is None else state.to(dtype)
    read = []
    for t in range(tokens):
        written = value[:, t, :, :, None] * key[:, t, :, None, :]
        read.append(torch.einsum("bhij,bhj->bhi", memory + bonus[:, None, :] * written, receptance[:, t]))
        memory = memory * decay + written
    y = torch.stack(read, 1) if read else value
    return y.to(v.dtype), memory


BACKEND = Backend("reference", "one token at a time, for checking", wkv5, Supports())
