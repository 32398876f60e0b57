"""RWKV v7 ("x070", Goose): memory with a learned in-context learning rate.

Letters: B batch, T tokens, C channels, H heads, N head size. Source: RWKV-7 paper (arXiv 2503.14456), section 3, and
RWKV-LM, RWKV-v7/train_temp/src/model.py. Tensor names are explained in ``models/names.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpeft.models.backbone import Rwkv, TimeMixing, Wkv
from rwkvpeft.models.initialise import depth_ratios, orthogonal, position
from rwkvpeft.models.layers import HeadNorm, Linear, parameter
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.models.state import BlockState
from rwkvpeft.ops.token_shift import last_token, mix_with_previous


class TimeMix(TimeMixing):
    """Read and write a per-head memory that decays and forgets along the removal key."""

    x_r: nn.Parameter
    x_w: nn.Parameter
    x_k: nn.Parameter
    x_v: nn.Parameter
    x_a: nn.Parameter
    x_g: nn.Parameter
    w0: nn.Parameter
    a0: nn.Parameter
    v0: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter

    def __init__(self, shape: ModelShape, wkv: Wkv, divisor: float) -> None:
        super().__init__()
        channels, width = shape.n_embd, shape.dim_att
        self.heads = shape.n_head
        self.wkv = wkv
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            self.register_parameter(name, parameter(1, 1, channels))
        for name in ("w0", "a0", "v0", "k_k", "k_a"):
            self.register_parameter(name, parameter(1, 1, width))
        ranks = {"w": shape.decay_rank, "a": shape.learning_rate_rank, "v": shape.value_rank, "g": shape.gate_rank}
        for letter, rank in ranks.items():
            self.register_parameter(f"{letter}1", parameter(channels, rank))
            self.register_parameter(f"{letter}2", parameter(rank, width))
        self.r_k = parameter(shape.n_head, shape.head_size)
        self.receptance = Linear(channels, width)
        self.key = Linear(channels, width)
        self.value = Linear(channels, width)
        self.output = Linear(width, channels)
        self.ln_x = HeadNorm(width, shape.n_head, divisor)
        self.register_parameter("time_state", None)
        self.register_parameter("shift_state", None)

    def forward(
        self, x: Tensor, first_value: Tensor | None, state: BlockState
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """See ``TimeMixing.forward``."""
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        x_r, x_w, x_k, x_v, x_a, x_g = mix_with_previous(x, state.time_shift, mixes)
        receptance, key, value = self.receptance(x_r), self.key(x_k), self.value(x_v)
        decay_logit = self._low_rank(x_w, "w", torch.tanh) + self.w0.to(x.dtype)
        learning_rate = torch.sigmoid(self._low_rank(x_a, "a") + self.a0.to(x.dtype))
        gate = self._low_rank(x_g, "g", torch.sigmoid)
        if first_value is None:
            first_value = value
        else:
            share = torch.sigmoid(self._low_rank(x_v, "v") + self.v0.to(x.dtype))
            value = torch.lerp(value, first_value, share)

        removal_key = F.normalize(self._heads(key * self.k_k.to(x.dtype)), dim=-1)
        key = key * (1 + (learning_rate - 1) * self.k_a.to(x.dtype))
        r, w, k, v, rate = map(self._heads, (receptance, decay_logit, key, value, learning_rate))
        memory = self.initial_memory(x, state.memory)
        read, memory = self.wkv(r=r, w=w, k=k, v=v, a=-removal_key, b=removal_key * rate, state=memory)
        bonus = (r * k * self.r_k.to(x.dtype)).sum(-1, keepdim=True) * v
        update = self.output((self.ln_x(read) + bonus.flatten(2)) * gate)
        return update, first_value, last_token(x, state.time_shift), memory

    def _low_rank(self, x: Tensor, letter: str, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        inner = x @ getattr(self, f"{letter}1").to(x.dtype)
        return (inner if activation is None else activation(inner)) @ getattr(self, f"{letter}2").to(x.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class ChannelMix(nn.Module):
    """Squared ReLU between two matrices."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.x_k = parameter(1, 1, shape.n_embd)
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.value = Linear(shape.dim_ffn, shape.n_embd)
        self.register_parameter("shift_state", None)

    def forward(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mix the channels of (B, T, C). Returns the update and the last token for the next call."""
        (x_k,) = mix_with_previous(x, last, (self.x_k,))
        return self.value(F.relu(self.key(x_k)).square()), last_token(x, last)


def _initial_block(shape: ModelShape, layer: int) -> dict[str, Tensor]:
    width, size = shape.dim_att, shape.head_size
    rising, falling = depth_ratios(layer, shape.n_layer)
    channel = position(shape.n_embd)
    ramp = torch.arange(width) / max(width - 1, 1)
    linear = ramp - 0.5
    zigzag = ((torch.arange(width) % size) - (size - 1) / 2) / ((size - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    decay = -6 + 6 * ramp ** (1 + rising**0.3)
    att: dict[str, Tensor] = {
        name: 1 - channel ** (power * falling)
        for name, power in (("x_r", 0.2), ("x_w", 0.9), ("x_k", 0.7), ("x_v", 0.7), ("x_a", 0.9), ("x_g", 0.2))
    }
    att |= {
        "w0": (decay + 0.5 + zigzag * 2.5).view(1, 1, -1),
        "a0": (-0.19 + zigzag * 0.3 + linear * 0.4).view(1, 1, -1),
        "v0": (0.73 - linear * 0.4).view(1, 1, -1),
        "k_k": (0.71 - linear * 0.1).view(1, 1, -1),
        "k_a": torch.full((1, 1, width), 1.02),
        "r_k": torch.full((shape.n_head, size), -0.04),
        "receptance.weight": orthogonal(width, shape.n_embd, 1.0),
        "key.weight": orthogonal(width, shape.n_embd, 0.1),
        "value.weight": orthogonal(width, shape.n_embd, 1.0),
        "output.weight": torch.zeros(shape.n_embd, width),
    }
    ranks = {"w": shape.decay_rank, "a": shape.learning_rate_rank, "v": shape.value_rank, "g": shape.gate_rank}
    for letter, rank in ranks.items():
        att[f"{letter}1"] = torch.zeros(shape.n_embd, rank)
        att[f"{letter}2"] = orthogonal(rank, width, 0.1 * math.sqrt(max(rank / width, 1)))
    ffn = {
        "x_k": 1 - channel ** (falling**4),
        "key.weight": orthogonal(shape.dim_ffn, shape.n_embd, 1.0),
        "value.weight": torch.zeros(shape.n_embd, shape.dim_ffn),
    }
    return {f"att.{name}": tensor for name, tensor in att.items()} | {
        f"ffn.{name}": tensor for name, tensor in ffn.items()
    }


class Rwkv7(Rwkv):
    """RWKV v7."""

    time_mix = TimeMix
    channel_mix = ChannelMix
    initial_block = staticmethod(_initial_block)

    def __init__(self, shape: ModelShape, wkv: Wkv, *, head_size_divisor: float = 8) -> None:
        super().__init__(shape, wkv, head_size_divisor=head_size_divisor)
        # block 0 has no earlier value to take from: official files carry its v0, v1, v2, and nothing reads them
        for name in ("v0", "v1", "v2"):
            self.get_parameter(f"blocks.0.att.{name}").requires_grad_(False)
