"""wkv7 by flash-linear-attention: chunks of 64 tokens, several kernels for each direction.

Without ``safe_gate`` its kernels go through chunks of 16 without matrix units, as a decay may be anything. Ours is
bounded, log d in (-0.6066, 0), and they are told so.
"""

from __future__ import annotations

import math

import torch
import triton
from fla.ops.rwkv7 import chunk_rwkv7
from torch import Tensor

from rwkvpeft.ops.contract import Backend, check_operands
from rwkvpeft.ops.fla_boundary import SUPPORTS, call
from rwkvpeft.ops.sequences import Sequences

STRONGEST = -math.exp(-0.5)
"""The log decay of a saturated logit."""

_BOUNDED = {"safe_gate": True, "lower_bound": STRONGEST}
# older compilers fail on larger chunks
_COMPILES_CHUNK_64 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 4)


def wkv7(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in chunks; arguments as ``rwkvpeft.ops.wkv7``."""
    check_operands("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, {}, None if sequences else state)
    # in fp32 to the end: a rounded log decay would be an absolute error of the decay
    log_decay = STRONGEST * torch.sigmoid(w.float())
    operands = {name: x.to(v.dtype) for name, x in {"r": r, "k": k, "v": v, "a": a, "b": b}.items()}
    options = {**_BOUNDED, "chunk_size": 64} if _COMPILES_CHUNK_64 else _BOUNDED
    return call(chunk_rwkv7, {**operands, "w": log_decay}, state, sequences, options)


BACKEND = Backend("fla", "flash-linear-attention", wkv7, SUPPORTS, packed=True)
