"""wkv6 as Triton kernels over chunks of tokens."""

from __future__ import annotations

from torch import Tensor

from rwkvpeft.ops.contract import Backend, check_operands
from rwkvpeft.ops.diagonal_triton import SUPPORTS, read_chunks
from rwkvpeft.ops.sequences import Sequences


def wkv6(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv6``, ``sequences`` as ``taking_sequences`` says."""
    check_operands("wkv6", {"r": r, "w": w, "k": k, "v": v}, {"u": u}, state if sequences is None else None)
    return read_chunks("wkv6", r, w, k, v, u, state, sequences)


BACKEND = Backend("triton", "chunked Triton kernels", wkv6, SUPPORTS, packed=True)
