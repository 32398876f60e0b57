"""wkv5 as Triton kernels over chunks of tokens."""

from __future__ import annotations

from torch import Tensor

from rwkvpeft.ops.contract import Backend, check_operands
from rwkvpeft.ops.diagonal_triton import SUPPORTS, read_chunks
from rwkvpeft.ops.sequences import Sequences


def wkv5(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv5``, ``sequences`` as ``taking_sequences`` says."""
    check_operands("wkv5", {"r": r, "k": k, "v": v}, {"w": w, "u": u}, state if sequences is None else None)
    return read_chunks("wkv5", r, w, k, v, u, state, sequences)


BACKEND = Backend("triton", "chunked Triton kernels", wkv5, SUPPORTS, packed=True)
