"""wkv6 as matrix products over chunks of tokens."""

from __future__ import annotations

from torch import Tensor

from rwkvpeft.ops.contract import Backend, Supports, check_operands, wants_grad
from rwkvpeft.ops.diagonal import read_chunks, read_one_token


def wkv6(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv6``."""
    check_operands("wkv6", {"r": r, "w": w, "k": k, "v": v}, {"u": u}, state)
    alone = v.shape[1] == 1 and not wants_grad(r, w, k, v, u, state)
    read = read_one_token if alone else read_chunks
    return read(r, w, k, v, u, state)


BACKEND = Backend("torch", "chunked matrix products", wkv6, Supports())
