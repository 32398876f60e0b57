"""The token before each token.

Letters: B batch, T tokens, C channels, S sequences of a packed row (then B = 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvpeft.ops.sequences import Sequences


def shift_tokens(x: Tensor, last: Tensor | None = None, sequences: Sequences | None = None) -> Tensor:
    """Return what each position's predecessor holds.

    Args:
        x: (B, T, C).
        last: (B, C), of a packed row (S, C): the token before the first one, from the state; None means zeros.
        sequences: of a packed row: no sequence sees the one before it.
    Returns: (B, T, C) in the dtype of ``x``.
    """
    if not x.shape[1]:
        return x
    if sequences is None:
        first = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last.to(x.dtype).unsqueeze(1)
        return torch.cat((first, x[:, :-1]), dim=1)
    bounds = sequences.bounds(x.device)
    shifted = torch.cat((x.new_zeros(1, 1, x.shape[2]), x[:, :-1]), dim=1)
    if last is None:
        return shifted.index_fill(1, bounds.starts, 0)
    return shifted.index_copy(1, bounds.starts, last.to(x.dtype)[bounds.filled].unsqueeze(0))


def last_token(x: Tensor, before: Tensor | None = None, sequences: Sequences | None = None) -> Tensor | None:
    """The last token of (B, T, C), (B, C), of a packed row (S, C); where there are none, the one that came before."""
    if sequences is not None:
        bounds = sequences.bounds(x.device)
        if before is None:
            before = x.new_zeros(len(sequences.lengths), x.shape[2])
        return before.to(x.dtype).index_copy(0, bounds.filled, x[0, bounds.ends])
    # a copy: a view would keep all tokens of every layer in memory for as long as the state lives
    return x[:, -1].clone() if x.shape[1] else before
