"""NEFTune: uniform noise on the embedded tokens in training. Source: Jain et al. (arXiv 2310.05914), algorithm 1.

Letters: B rows, T tokens, C channels, S sequences of a packed row, L tokens of a document.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rwkvpeft.ops.sequences import Sequences


def add_noise(x: Tensor, alpha: float, sequences: Sequences | None, lengths: Tensor | None) -> Tensor:
    """Add to each number of ``x`` (B, T, C) one drawn between -1 and 1, times alpha / sqrt(L C).

    Args:
        sequences: the documents of a packed row, each with a length of its own.
        lengths: L of each row (B,), or of each packed sequence (S,); None means T, or the length of the sequence.
    """
    if lengths is None:
        found = (x.shape[1],) * x.shape[0] if sequences is None else sequences.lengths
        lengths = torch.tensor(found, device=x.device)
    # computed in at least fp32; a document without tokens has no noise that could be infinite
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale = alpha / math.sqrt(x.shape[2]) * lengths.clamp(min=1).to(dtype).rsqrt()
    if sequences is None:
        scale = scale[:, None, None]
    else:
        repeats = torch.tensor(sequences.lengths, device=x.device)
        scale = scale.repeat_interleave(repeats, output_size=sequences.tokens)[None, :, None]
    noise = torch.empty(x.shape, dtype=dtype, device=x.device).uniform_(-1, 1)
    return x + (noise * scale).to(x.dtype)
