"""headQK: each token that was read before gets a logit of its own, by how well its key fits the present query.

Source: RWKV-LM, RWKV-v5/src/model.py, ``head_qk``. With q = head_q(h), k = head_k(h) for the normed hidden states h,
and N the width of both, position t adds to the logit of the token x_s, for each s up to t::

    q_t . k_s / N

Letters: R positions of all rows one behind another, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvpeft.ops.sequences import Sequences


@dataclass(frozen=True)
class Copies:
    """What one batch adds to its logits.

    Args:
        queries, keys: (R, N).
        tokens: (R,), what was read.
        starts: (R,), the position at which each one's document starts; earlier ones are not looked at.
        offsets: these starts in order, known without waiting for the device.
    """

    queries: Tensor
    keys: Tensor
    tokens: Tensor
    starts: Tensor
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, tokens: Tensor, sequences: Sequences | None) -> Copies:
        """For queries and keys of (B, T, N) and tokens of (B, T), rows or the documents of a packed row."""
        rows, length = tokens.shape
        if sequences is None:
            starts = torch.arange(rows, device=tokens.device).mul(length).repeat_interleave(length)
            offsets = tuple(range(0, rows * length, max(length, 1)))
        else:
            offsets = sequences.offsets[:-1]
            repeats = torch.tensor(sequences.lengths, device=tokens.device)
            starts = torch.tensor(offsets, device=tokens.device).repeat_interleave(repeats, output_size=length)
        return cls(queries.flatten(0, 1), keys.flatten(0, 1), tokens.flatten(), starts, offsets)

    def add(self, logits: Tensor, place: slice) -> Tensor:
        """The logits of the positions ``place``, (rows, V), with what earlier tokens add to them."""
        first = self.offsets[bisect_right(self.offsets, place.start) - 1]
        seen = slice(first, place.stop)
        scores = self.queries[place] @ self.keys[seen].T / self.queries.shape[1]
        present = torch.arange(place.start, place.stop, device=logits.device)[:, None]
        earlier = torch.arange(first, place.stop, device=logits.device)
        scores = scores.masked_fill((earlier > present) | (earlier < self.starts[place, None]), 0)
        # sums equal tokens in the same order in every run, which index_add does not on a GPU
        return logits.T.index_put((self.tokens[seen],), scores.T, accumulate=True).T
