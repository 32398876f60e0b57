"""RWKV v5.2 ("x052", Eagle): a matrix memory with a fixed decay per channel.

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


class TimeMix(TimeMixing):
    """Read and write a per-head memory that decays at a fixed rate per channel."""

    time_mix_k: nn.Parameter
    time_mix_v: nn.Parameter
    time_mix_r: nn.Parameter
    time_mix_g: nn.Parameter

    def __init__(self, shape: ModelShape, wkv: Wkv, divisor: float, ops: BlockOps) -> None:
        super().__init__()
        self.ops = ops
        channels, width = shape.n_embd, shape.dim_att
        self.heads = shape.n_head
        self.wkv = wkv
        for letter in ("k", "v", "r", "g"):
            self.register_parameter(f"time_mix_{letter}", parameter(1, 1, channels))
        self.time_decay = parameter(shape.n_head, shape.head_size)
        self.time_faaaa = parameter(shape.n_head, shape.head_size)
        self.receptance = Linear(channels, width)
        self.key = Linear(channels, width)
        self.value = Linear(channels, width)
        self.gate = Linear(channels, width)
        self.output = Linear(width, channels)
        self.ln_x = HeadNorm(width, divisor)
        self.register_parameter("time_state", None)
        self.register_parameter("shift_state", None)

    def shift_mixes(self) -> tuple[Tensor, ...]:
        """See ``TimeMixing.shift_mixes``."""
        # v5 stores the share of the token itself; the mixing takes that of its predecessor
        return tuple(1 - mix for mix in (self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g))

    def forward(
        self, mixed: Mixed, first_value: Tensor | None, state: BlockState, sequences: Sequences | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See ``TimeMixing.forward``."""
        x_k, x_v, x_r, x_g = mixed.tokens
        r, k, v = (
            part.unflatten(-1, (self.heads, -1)) for part in (self.receptance(x_r), self.key(x_k), self.value(x_v))
        )
        memory = self.initial_memory(r, state.memory, sequences)
        decay, bonus = self.time_decay.to(r.dtype), self.time_faaaa.to(r.dtype)
        read, memory = self.recall(sequences, r=r, w=decay, k=k, v=v, u=bonus, state=memory)
        return self.output(self.ops.norm_gate(read, self.gate(x_g), self.ln_x.norm())), first_value, memory


class ChannelMix(GatedChannelMix):
    """Gated squared ReLU."""

    def __init__(self, shape: ModelShape, ops: BlockOps) -> None:
        super().__init__(shape, ops)
        self.time_mix_k = parameter(1, 1, shape.n_embd)
        self.time_mix_r = parameter(1, 1, shape.n_embd)

    def shift_mixes(self) -> tuple[Tensor, Tensor]:
        """See ``GatedChannelMix.shift_mixes``."""
        return 1 - self.time_mix_k, 1 - self.time_mix_r


_SQUARE_GAINS = (("receptance", 1.0), ("value", 1.0), ("gate", 0.1))


def _initial_time_mix(shape: ModelShape, layer: int) -> dict[str, Tensor]:
    channels, width = shape.n_embd, shape.dim_att
    rising, falling = depth_ratios(layer, shape.n_layer)
    channel = position(channels)
    decay, bonus = decay_and_bonus(shape, layer)
    square = {name: orthogonal(width, channels, gain) for name, gain in _SQUARE_GAINS}
    return {f"{name}.weight": tensor for name, tensor in square.items()} | {
        "time_mix_k": channel**falling,
        "time_mix_v": channel**falling + 0.3 * rising,
        "time_mix_r": channel ** (0.5 * falling),
        "time_mix_g": channel ** (0.5 * falling),
        "time_decay": decay.view(shape.n_head, shape.head_size),
        "time_faaaa": bonus.view(shape.n_head, shape.head_size),
        "key.weight": orthogonal(width, channels, 0.1),
        "output.weight": torch.zeros(channels, width),
    }


def _initial_channel_mix(shape: ModelShape, layer: int) -> dict[str, Tensor]:
    channels = shape.n_embd
    _, falling = depth_ratios(layer, shape.n_layer)
    channel = position(channels)
    return {
        "time_mix_k": channel**falling,
        "time_mix_r": channel**falling,
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


class Rwkv5(Rwkv):
    """RWKV v5.2."""

    time_mix = TimeMix
    channel_mix = ChannelMix
    initial_block = staticmethod(_initial_block)
