"""The channel mixing of v5 and v6: squared ReLU between two matrices, behind a gate."""

from __future__ import annotations

from torch import Tensor, nn

from rwkvpeft.models.layers import Linear
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.ops.block.contract import BlockOps


class ChannelMixing(nn.Module):
    """What every version's channel mixing answers to."""

    shift_state: nn.Parameter | None

    def shift_mixes(self) -> tuple[Tensor, ...]:
        """Shares of the previous token in each mixture that ``forward`` takes, (1, 1, C) each."""
        raise NotImplementedError

    def forward(self, *mixed: Tensor) -> Tensor:
        """Return the update of the residual stream, (B, T, C), for mixtures (B, T, C)."""
        raise NotImplementedError


class GatedChannelMix(ChannelMixing):
    """``key``, ``value`` and ``receptance``. A version says how its two mixes are named and read."""

    def __init__(self, shape: ModelShape, ops: BlockOps) -> None:
        super().__init__()
        self.ops = ops
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.receptance = Linear(shape.n_embd, shape.n_embd)
        self.value = Linear(shape.dim_ffn, shape.n_embd)
        self.register_parameter("shift_state", None)

    def shift_mixes(self) -> tuple[Tensor, Tensor]:
        """Shares of the previous token for key and receptance."""
        raise NotImplementedError

    def forward(self, *mixed: Tensor) -> Tensor:
        """See ``ChannelMixing.forward``."""
        x_k, x_r = mixed
        value = self.value(self.ops.squared_relu(self.key(x_k)))
        return self.ops.gate_value(self.receptance(x_r), value)
