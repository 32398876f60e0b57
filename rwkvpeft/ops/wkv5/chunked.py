"""wkv5 as matrix products over chunks of tokens."""

from __future__ import annotations

from torch import Tensor

from rwkvpeft.ops.contract import Backend, Supports, check_operands, wants_grad
from rwkvpeft.ops.diagonal import read_chunks, read_one_token
from rwkvpeft.ops.sequences import Sequences


def wkv5(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv5``, ``sequences`` as ``taking_sequences`` says."""
    check_operands("wkv5", {"r": r, "k": k, "v": v}, {"w": w, "u": u}, None if sequences else state)
    if v.shape[1] == 1 and sequences is None and not wants_grad(r, w, k, v, u, state):
        return read_one_token(r, w, k, v, u, state)
    return read_chunks(r, w, k, v, u, state, sequences)


BACKEND = Backend("torch", "chunked matrix products", wkv5, Supports(), packed=True)
