"""wkv5 by flash-linear-attention: its wkv6 with the same decay at every token."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvpeft.ops.contract import Backend, check_operands
from rwkvpeft.ops.fla_boundary import SUPPORTS
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.wkv6.fla_kernel import read_with


def wkv5(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv5``."""
    check_operands("wkv5", {"r": r, "k": k, "v": v}, {"w": w, "u": u}, None if sequences else state)
    return read_with((-torch.exp(w.float())).expand(v.shape), r, k, v, u, state, sequences)


BACKEND = Backend("fla", "flash-linear-attention", wkv5, SUPPORTS, packed=True)
