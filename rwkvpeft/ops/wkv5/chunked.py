"""wkv5 as matrix products over chunks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvpeft.ops.contract import Backend, Supports, check_operands, compute_dtype
from rwkvpeft.ops.diagonal import CHUNK, read_chunks, read_one_token


def wkv5(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv5``."""
    check_operands("wkv5", {"r": r, "k": k, "v": v}, {"w": w, "u": u}, state)
    log_decay = -torch.exp(w.to(compute_dtype(r, w, k, v, u, state)))
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r, w, k, v, u, state))
    if not wants_grad and v.shape[1] == 1:
        return read_one_token(r, log_decay, k, v, u, state)
    if v.shape[1] % CHUNK or v.shape[1] == 0:
        # the filling of the last chunk must not decay the state, so there the decay does change
        log_decay = log_decay.expand(v.shape)
    return read_chunks(r, log_decay, k, v, u, state)


BACKEND = Backend("torch", "chunked matrix products", wkv5, Supports())
