"""wkv6 by flash-linear-attention."""

from __future__ import annotations

import torch
from fla.ops.rwkv6 import chunk_rwkv6
from torch import Tensor

from rwkvpeft.ops.contract import Backend, check_operands
from rwkvpeft.ops.fla_boundary import SUPPORTS, call
from rwkvpeft.ops.sequences import Sequences


def wkv6(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv6``."""
    check_operands("wkv6", {"r": r, "w": w, "k": k, "v": v}, {"u": u}, None if sequences else state)
    return read_with(-torch.exp(w.float()), r, k, v, u, state, sequences)


def read_with(
    log_decay: Tensor, r: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, sequences: Sequences | None
) -> tuple[Tensor, Tensor]:
    """The recurrence whose decay's logarithm is given, (B, T, H, N) in fp32."""
    operands = {"r": r.to(v.dtype), "k": k.to(v.dtype), "v": v, "w": log_decay, "u": u.float()}
    return call(chunk_rwkv6, operands, state, sequences, {})


BACKEND = Backend("fla", "flash-linear-attention", wkv6, SUPPORTS, packed=True)
