"""wkv5 token by token in CUDA C++."""

from __future__ import annotations

from torch import Tensor

from rwkvpeft.ops import cuda_build
from rwkvpeft.ops.contract import Backend, check_operands
from rwkvpeft.ops.diagonal_cuda import read_tokens


def wkv5(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as written; arguments as ``rwkvpeft.ops.wkv5``."""
    check_operands("wkv5", {"r": r, "k": k, "v": v}, {"w": w, "u": u}, state)
    return read_tokens(r, w, k, v, u, state)


BACKEND = Backend(
    "cuda", "CUDA, token by token", wkv5, cuda_build.SUPPORTS, waits_for=cuda_build.waits_for
)
