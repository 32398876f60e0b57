"""RWKV v6 ("x060", Finch): data-dependent token shift and decay.

Letters: B batch, T tokens, C channels, H heads, N head size. Source: Eagle and Finch paper (arXiv 2404.05892) and
RWKV-LM, RWKV-v5/src/model.py. Tensor names are explained in ``models/names.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkvpeft.models.backbone import Rwkv, TimeMixing, Wkv
from rwkvpeft.models.channel_mix import GatedChannelMix
from rwkvpeft.models.initialise import decay_and_bonus, depth_ratios, orthogonal, position
from rwkvpeft.models.layers import HeadNorm, Linear, parameter
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.models.state import BlockState
from rwkvpeft.ops.block.contract import BlockOps, Mixed
from rwkvpeft.ops.sequences import Sequences

_MIXED = ("w", "k", "v", "r", "g")


class TimeMix(TimeMixing):
    """Read and write a per-head memory whose decay depends on the token."""

    time_maa_x: nn.Parameter

    def __init__(self, shape: ModelShape, wkv: Wkv, divisor: float, ops: BlockOps) -> None:
        super().__init__()
        self.ops = ops
        channels, width = shape.n_embd, shape.dim_att
        self.heads = shape.n_head
        self.wkv = wkv
        for letter in ("x", *_MIXED):
            self.register_parameter(f"time_maa_{letter}", parameter(1, 1, channels))
        self.time_maa_w1 = parameter(channels, shape.mix_rank * len(_MIXED))
        self.time_maa_w2 = parameter(len(_MIXED), shape.mix_rank, channels)
        self.time_decay = parameter(1, 1, width)
        self.time_decay_w1 = parameter(channels, shape.decay_rank)
        self.time_decay_w2 = parameter(shape.decay_rank, width)
        self.time_faaaa = parameter(shape.n_head, shape.head_size)
        self.receptance = Linear(channels, width)
        self.key = Linear(channels, width)
        self.value = Linear(channels, width)
        self.gate = Linear(channels, width)
        self.output = Linear(width, channels)
        self.ln_x = HeadNorm(width, divisor)
        self.register_parameter("time_state", None)
        self.register_parameter("shift_state", None)

    def shift_mixes(self) -> tuple[Tensor | None, ...]:
        """See ``TimeMixing.shift_mixes``: the token itself, and the mixture from which the other shares are made."""
        return None, self.time_maa_x

    def forward(
        self, mixed: Mixed, first_value: Tensor | None, state: BlockState, sequences: Sequences | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See ``TimeMixing.forward``."""
        x, _ = mixed.tokens
        x_w, x_k, x_v, x_r, x_g = self._mixed_tokens(mixed, state.time_shift, sequences)
        decay_logit = torch.tanh(x_w @ self.time_decay_w1.to(x.dtype)) @ self.time_decay_w2.to(x.dtype)
        decay_logit = decay_logit + self.time_decay.to(x.dtype)
        r, w, k, v = (
            part.unflatten(-1, (self.heads, -1))
            for part in (self.receptance(x_r), decay_logit, self.key(x_k), self.value(x_v))
        )
        memory = self.initial_memory(x, state.memory, sequences)
        read, memory = self.recall(sequences, r=r, w=w, k=k, v=v, u=self.time_faaaa.to(x.dtype), state=memory)
        return self.output(self.ops.norm_gate(read, self.gate(x_g), self.ln_x.norm())), first_value, memory

    def _mixed_tokens(
        self, mixed: Mixed, last: Tensor | None, sequences: Sequences | None
    ) -> tuple[Tensor, ...]:
        """Five mixtures of each token with its predecessor, the shares themselves computed from the two."""
        x, coarse = mixed.tokens
        inner = torch.tanh(coarse @ self.time_maa_w1.to(x.dtype)).unflatten(-1, (len(_MIXED), -1))
        shares = torch.matmul(inner.flatten(0, 1).transpose(0, 1), self.time_maa_w2.to(x.dtype))
        shares = shares.unflatten(1, x.shape[:2])
        mixes = tuple(getattr(self, f"time_maa_{letter}") for letter in _MIXED)
        return self.ops.mix_by_token(x, mixed.towards, last, shares, mixes, sequences)


class ChannelMix(GatedChannelMix):
    """Gated squared ReLU."""

    def __init__(self, shape: ModelShape, ops: BlockOps) -> None:
        super().__init__(shape, ops)
        self.time_maa_k = parameter(1, 1, shape.n_embd)
        self.time_maa_r = parameter(1, 1, shape.n_embd)

    def shift_mixes(self) -> tuple[Tensor, Tensor]:
        """See ``GatedChannelMix.shift_mixes``."""
        return self.time_maa_k, self.time_maa_r


_SQUARE_GAINS = (("receptance", 1.0), ("value", 1.0), ("gate", 0.1))


def _initial_time_mix(shape: ModelShape, layer: int) -> dict[str, Tensor]:
    channels, width = shape.n_embd, shape.dim_att
    rising, falling = depth_ratios(layer, shape.n_layer)
    channel = position(channels)
    decay, bonus = decay_and_bonus(shape, layer)
    square = {name: orthogonal(width, channels, gain) for name, gain in _SQUARE_GAINS}
    return {f"{name}.weight": tensor for name, tensor in square.items()} | {
        "time_maa_x": 1 - channel**falling,
        "time_maa_w": 1 - channel**falling,
        "time_maa_k": 1 - channel**falling,
        "time_maa_v": 1 - (channel**falling + 0.3 * rising),
        "time_maa_r": 1 - channel ** (0.5 * falling),
        "time_maa_g": 1 - channel ** (0.5 * falling),
        "time_maa_w1": torch.zeros(channels, shape.mix_rank * len(_MIXED)),
        "time_maa_w2": torch.empty(len(_MIXED), shape.mix_rank, channels).uniform_(-0.01, 0.01),
        "time_decay": decay.view(1, 1, -1),
        "time_decay_w1": torch.zeros(channels, shape.decay_rank),
        "time_decay_w2": torch.empty(shape.decay_rank, width).uniform_(-0.01, 0.01),
        "time_faaaa": bonus.view(shape.n_head, shape.head_size),
        "key.weight": orthogonal(width, channels, 0.1),
        "output.weight": torch.zeros(channels, width),
    }


def _initial_channel_mix(shape: ModelShape, layer: int) -> dict[str, Tensor]:
    channels = shape.n_embd
    _, falling = depth_ratios(layer, shape.n_layer)
    channel = position(channels)
    return {
        "time_maa_k": 1 - channel ** (falling**3),
        "time_maa_r": 1 - channel ** (falling**3),
        "key.weight": orthogonal(shape.dim_ffn, channels, 1.0),
        "receptance.weight": torch.zeros(channels, channels),
        "value.weight": torch.zeros(channels, shape.dim_ffn),
    }


def _initial_block(shape: ModelShape, layer: int) -> dict[str, Tensor]:
    first = ("att", _initial_time_mix) if layer in shape.time_mixing_layers else ("ffnPre", _initial_channel_mix)
    return {
        f"{part}.{name}": tensor
        for part, initial in (first, ("ffn", _initial_channel_mix))
        for name, tensor in initial(shape, layer).items()
    }


class Rwkv6(Rwkv):
    """RWKV v6."""

    time_mix = TimeMix
    channel_mix = ChannelMix
    initial_block = staticmethod(_initial_block)
