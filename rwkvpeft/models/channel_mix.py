"""The channel mixing of v5 and v6: squared ReLU between two matrices, behind a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpeft.models.layers import Linear
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.ops.token_shift import last_token, mix_with_previous


class GatedChannelMix(nn.Module):
    """``key``, ``value`` and ``receptance``. A version says how its two mixes are named and read."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.receptance = Linear(shape.n_embd, shape.n_embd)
        self.value = Linear(shape.dim_ffn, shape.n_embd)
        self.register_parameter("shift_state", None)

    def shift_mixes(self) -> tuple[Tensor, Tensor]:
        """Shares of the previous token for key and receptance, (1, 1, C) each."""
        raise NotImplementedError

    def forward(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mix the channels of (B, T, C). Returns the update and the last token for the next call."""
        x_k, x_r = mix_with_previous(x, last, self.shift_mixes())
        value = self.value(F.relu(self.key(x_k)).square())
        return torch.sigmoid(self.receptance(x_r)) * value, last_token(x, last)
