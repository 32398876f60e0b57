"""The token before each token.

Letters: B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_tokens(x: Tensor, last: Tensor | None = None) -> Tensor:
    """Return what each position's predecessor holds.

    Args:
        x: (B, T, C).
        last: (B, C), the token before the first one, from the state; None means zeros.
    Returns: (B, T, C) in the dtype of ``x``.
    """
    first = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last.to(x.dtype).unsqueeze(1)
    return torch.cat((first, x[:, :-1]), dim=1) if x.shape[1] else x


def last_token(x: Tensor, before: Tensor | None = None) -> Tensor | None:
    """The last token of (B, T, C), (B, C); with T = 0 the one that came before."""
    # a copy: a view would keep all tokens of every layer in memory for as long as the state lives
    return x[:, -1].clone() if x.shape[1] else before
