"""A block's operators in plain PyTorch, for every device and dtype. ``contract.py`` says what each computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvpeft.ops.block.contract import BlockOps, KeyParameters, Mixed, Norm, PreparedKeys
from rwkvpeft.ops.contract import Supports
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.token_shift import last_token, shift_tokens


def norm_mix(
    x: Tensor,
    update: Tensor | None,
    norm: Norm,
    last: Tensor | None,
    mixes: tuple[Tensor | None, ...],
    sequences: Sequences | None = None,
) -> Mixed:
    """See ``NormMix``."""
    residual = x if update is None else x + update
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    normed = F.layer_norm(residual, weight.shape, weight, bias, norm.eps)
    towards = shift_tokens(normed, last, sequences) - normed
    tokens = tuple(normed if mix is None else torch.addcmul(normed, towards, mix.to(x.dtype)) for mix in mixes)
    return Mixed(residual, tokens, last_token(normed, last, sequences), towards)


def mix_by_token(
    x: Tensor,
    towards: Tensor | None,
    last: Tensor | None,
    shares: Tensor,
    mixes: tuple[Tensor, ...],
    sequences: Sequences | None = None,
) -> tuple[Tensor, ...]:
    """See ``MixByToken``."""
    # a second copy would be kept for the backward pass
    towards = shift_tokens(x, last, sequences) - x if towards is None else towards
    return tuple(
        torch.addcmul(x, towards, share + mix.to(x.dtype)) for share, mix in zip(shares.unbind(0), mixes, strict=True)
    )


def prepare_keys(
    key: Tensor,
    value: Tensor,
    rate_logit: Tensor,
    first_value: Tensor | None,
    share_logit: Tensor | None,
    parameters: KeyParameters,
    heads: int,
) -> PreparedKeys:
    """See ``PrepareKeys``."""
    a0, k_k, k_a, v0 = (parameter.to(key.dtype) for parameter in parameters)
    rate = torch.sigmoid(rate_logit + a0)
    if first_value is not None and share_logit is not None:
        value = torch.lerp(value, first_value, torch.sigmoid(share_logit + v0))
    removal_key = F.normalize((key * k_k).unflatten(-1, (heads, -1)), dim=-1)
    key = key * (1 + (rate - 1) * k_a)
    key, value, rate = (part.unflatten(-1, (heads, -1)) for part in (key, value, rate))
    return PreparedKeys(key, value, -removal_key, removal_key * rate)


def norm_bonus_gate(
    read: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, norm: Norm, r_k: Tensor
) -> Tensor:
    """See ``NormBonusGate``."""
    bonus = (r * k * r_k.to(r.dtype)).sum(-1, keepdim=True) * v
    return (_head_norm(read, norm) + bonus.flatten(2)) * gate


def norm_gate(read: Tensor, gate: Tensor, norm: Norm) -> Tensor:
    """See ``NormGate``."""
    return _head_norm(read, norm) * F.silu(gate)


def squared_relu(x: Tensor) -> Tensor:
    """See ``SquaredRelu``."""
    return F.relu(x).square()


def gate_value(receptance: Tensor, value: Tensor) -> Tensor:
    """See ``GateValue``."""
    return torch.sigmoid(receptance) * value


def _head_norm(x: Tensor, norm: Norm) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=norm.eps).flatten(2)
    return torch.addcmul(norm.bias.to(x.dtype), normed, norm.weight.to(x.dtype))


PLAIN = BlockOps(
    name="torch",
    summary="plain PyTorch",
    supports=Supports(),
    norm_mix=norm_mix,
    mix_by_token=mix_by_token,
    prepare_keys=prepare_keys,
    norm_bonus_gate=norm_bonus_gate,
    norm_gate=norm_gate,
    squared_relu=squared_relu,
    gate_value=gate_value,
)
