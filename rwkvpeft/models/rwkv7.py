"""RWKV v7 ("x070", Goose): memory with a learned in-context learning rate.

Letters: B batch, T tokens, C channels, H heads, N head size. Source: RWKV-7 paper (arXiv 2503.14456), section 3, and
RWKV-LM, RWKV-v7/train_temp/src/model.py. Tensor names are explained in ``models/names.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rwkvpeft.models.backbone import Rwkv, TimeMixing, Wkv
from rwkvpeft.models.channel_mix import ChannelMixing
from rwkvpeft.models.initialise import depth_ratios, orthogonal, position
from rwkvpeft.models.layers import HeadNorm, Linear, parameter
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.models.state import BlockState
from rwkvpeft.ops.block.contract import BlockOps, KeyParameters, Mixed
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.sequences import Sequences


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

    def __init__(self, shape: ModelShape, wkv: Wkv, divisor: float, ops: BlockOps) -> None:
        super().__init__()
        self.ops = ops
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
        self.ln_x = HeadNorm(width, divisor)
        self.register_parameter("time_state", None)
        self.register_parameter("shift_state", None)

    def shift_mixes(self) -> tuple[Tensor, ...]:
        """See ``TimeMixing.shift_mixes``."""
        return self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g

    def forward(
        self, mixed: Mixed, first_value: Tensor | None, state: BlockState, sequences: Sequences | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See ``TimeMixing.forward``."""
        x_r, x_w, x_k, x_v, x_a, x_g = mixed.tokens
        receptance, key, value = self.receptance(x_r), self.key(x_k), self.value(x_v)
        decay_logit = self._low_rank(x_w, "w", torch.tanh) + self.w0.to(x_w.dtype)
        rate_logit = self._low_rank(x_a, "a")
        gate = self._low_rank(x_g, "g", torch.sigmoid)
        share_logit = None if first_value is None else self._low_rank(x_v, "v")
        parameters = KeyParameters(self.a0, self.k_k, self.k_a, self.v0)
        k, v, remove, write = self.ops.prepare_keys(
            key, value, rate_logit, first_value, share_logit, parameters, self.heads
        )
        r, w = (part.unflatten(-1, (self.heads, -1)) for part in (receptance, decay_logit))
        memory = self.initial_memory(r, state.memory, sequences)
        read, memory = self.recall(sequences, r=r, w=w, k=k, v=v, a=remove, b=write, state=memory)
        update = self.output(self.ops.norm_bonus_gate(read, r, k, v, gate, self.ln_x.norm(), self.r_k))
        return update, value if first_value is None else first_value, memory

    def _low_rank(self, x: Tensor, letter: str, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        inner = x @ getattr(self, f"{letter}1").to(x.dtype)
        return (inner if activation is None else activation(inner)) @ getattr(self, f"{letter}2").to(x.dtype)


class ChannelMix(ChannelMixing):
    """Squared ReLU between two matrices."""

    def __init__(self, shape: ModelShape, ops: BlockOps) -> None:
        super().__init__()
        self.ops = ops
        self.x_k = parameter(1, 1, shape.n_embd)
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.value = Linear(shape.dim_ffn, shape.n_embd)
        self.register_parameter("shift_state", None)

    def shift_mixes(self) -> tuple[Tensor, ...]:
        """See ``ChannelMixing.shift_mixes``."""
        return (self.x_k,)

    def forward(self, *mixed: Tensor) -> Tensor:
        """See ``ChannelMixing.forward``."""
        return self.value(self.ops.squared_relu(self.key(mixed[0])))


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

    def __init__(
        self, shape: ModelShape, wkv: Wkv, *, head_size_divisor: float = 8, block_ops: BlockOps = PLAIN
    ) -> None:
        super().__init__(shape, wkv, head_size_divisor=head_size_divisor, block_ops=block_ops)
        # block 0 has no earlier value to take from: official files carry its v0, v1, v2, and nothing reads them
        for name in ("v0", "v1", "v2"):
            self.get_parameter(f"blocks.0.att.{name}").requires_grad_(False)
