"""What a frozen teacher says of tokens.

Letters: B rows, T tokens, K tokens that are told apart, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.data.batches import DistillationBatch, TokenBatch
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.head_qk import Copies
from rwkvpeft.models.state import RecurrentState
from rwkvpeft.ops.divergence import Likeliest, likeliest


class Read(NamedTuple):
    """Hidden states (B, t, C) of some tokens of every row, what headQK adds to their logits if the model has it, and
    the state behind them."""

    hidden: Tensor
    copies: Copies | None
    state: RecurrentState


def read_in_chunks(
    model: Rwkv, batch: TokenBatch, chunk: int | None = None, state: RecurrentState | None = None
) -> Iterator[Read]:
    """Run a model over rows, ``chunk`` tokens at a time, in the memory of one chunk.

    Args:
        batch: on the model's device. Packed rows are never cut.
        state: what earlier tokens of the rows left behind.
    Raises: UserError for headQK in more than one chunk.
    """
    whole = chunk is None or batch.sequences is not None or chunk >= batch.input_ids.shape[1]
    for part in [batch] if whole else batch.cut(chunk or 1):
        before = state
        with torch.no_grad():
            hidden, state = model.hidden(part.input_ids, before, sequences=part.sequences)
            copies = model.copies(hidden, part.input_ids, before, part.sequences)
        yield Read(hidden, copies, state)


def words_of(
    model: Rwkv, read: Read, k: int, temperatures: tuple[float, ...], *, wanted: Tensor | None = None, chunk_rows: int
) -> Iterator[tuple[Tensor | slice, Likeliest]]:
    """The likeliest tokens of rows of hidden states, and which rows they are; few rows of logits exist at once.

    Args:
        wanted: (R,) the rows that are; None for all. With headQK all are worked out.
    """
    flat = read.hidden.flatten(0, 1)
    places: list[Tensor | slice] = [slice(start, start + chunk_rows) for start in range(0, len(flat), chunk_rows)]
    if wanted is not None and read.copies is None:
        index = wanted.nonzero().squeeze(1)
        places = [*index.split(chunk_rows)] if len(index) else []
    for place in places:
        with torch.no_grad():
            logits = model.head(flat[place])
            if read.copies is not None:
                assert isinstance(place, slice)
                logits = read.copies.add(logits, slice(place.start, min(place.stop, len(flat))))
            yield place, likeliest(logits, min(k, logits.shape[1]) or logits.shape[1], temperatures)


@dataclass(frozen=True)
class Teacher:
    """A model that is learned from, in evaluation mode, of any version, size, device and dtype.

    Args:
        top_k: tokens that are told apart; 0 for all.
        chunk: tokens of a row that are worked through at once; None for whole rows. Packed rows are not cut.
        chunk_rows: rows of logits that exist at once.
    """

    model: Rwkv
    top_k: int
    temperature: float
    chunk: int | None = None
    chunk_rows: int = 128

    def label(self, batch: TokenBatch) -> DistillationBatch:
        """The batch with the teacher's words, on its own device. Tokens without weight get none, but zeros."""
        there = batch.on(self.model.emb.weight.device)
        rows, tokens = batch.input_ids.shape
        k = min(self.top_k, self.model.shape.vocab_size) or self.model.shape.vocab_size
        device = batch.input_ids.device
        ids = torch.zeros(rows, tokens, k, dtype=torch.int32, device=device)
        logprobs = torch.zeros(rows, tokens, k, device=device)
        tail = torch.zeros(rows, tokens, device=device)
        start = 0
        for read in read_in_chunks(self.model, there, self.chunk):
            columns = slice(start, start + read.hidden.shape[1])
            start = columns.stop
            wanted = there.weights[:, columns].flatten() != 0
            found = words_of(self.model, read, k, (self.temperature,), wanted=wanted, chunk_rows=self.chunk_rows)
            for place, words in found:
                row, column = _coordinates(place, rows, read.hidden.shape[1], device)
                own = words.logprobs / self.temperature - words.normalisers[0][:, None]
                ids[row, column + columns.start] = words.ids.to(device, torch.int32)
                logprobs[row, column + columns.start] = own.to(device, logprobs.dtype)
                tail[row, column + columns.start] = words.tails[0].to(device, tail.dtype)
        return DistillationBatch(*batch[:4], ids, logprobs, tail, batch.sequences)


def _coordinates(place: Tensor | slice, rows: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of flattened places."""
    if isinstance(place, slice):
        place = torch.arange(place.start, min(place.stop, rows * tokens))
    place = place.to(device)
    return place // tokens, place % tokens
