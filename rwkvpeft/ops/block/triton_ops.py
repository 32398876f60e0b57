"""A block's operators as Triton kernels. ``contract.py`` says what each computes."""

from __future__ import annotations

import torch

from rwkvpeft.ops.block.contract import BlockOps
from rwkvpeft.ops.block.triton_head_norm import norm_bonus_gate, norm_gate
from rwkvpeft.ops.block.triton_mix_by_token import mix_by_token
from rwkvpeft.ops.block.triton_norm_mix import norm_mix
from rwkvpeft.ops.block.triton_pointwise import gate_value, squared_relu
from rwkvpeft.ops.block.triton_prepare_keys import prepare_keys
from rwkvpeft.ops.contract import Supports

TRITON = BlockOps(
    name="triton",
    summary="fused Triton kernels",
    supports=Supports(
        device_types=frozenset({"cuda"}), dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32})
    ),
    norm_mix=norm_mix,
    mix_by_token=mix_by_token,
    prepare_keys=prepare_keys,
    norm_bonus_gate=norm_bonus_gate,
    norm_gate=norm_gate,
    squared_relu=squared_relu,
    gate_value=gate_value,
)
