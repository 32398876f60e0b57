"""wkv6 as matrix products over chunks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvpeft.ops.contract import Backend, Supports, check_operands, compute_dtype
from rwkvpeft.ops.diagonal import read_chunks, read_one_token


def wkv6(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv6``."""
    check_operands("wkv6", {"r": r, "w": w, "k": k, "v": v}, {"u": u}, state)
    log_decay = -torch.exp(w.to(compute_dtype(r, w, k, v, u, state)))
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r, w, k, v, u, state))
    read = read_chunks if wants_grad or v.shape[1] != 1 else read_one_token
    return read(r, log_decay, k, v, u, state)


BACKEND = Backend("torch", "chunked matrix products", wkv6, Supports())
