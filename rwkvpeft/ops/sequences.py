"""Sequences of unequal length that lie one behind another in one row of tokens.

Letters: S sequences, T tokens of the row, H heads, N head size, L tokens in a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.errors import ContractError
from rwkvpeft.ops.contract import Backend, Wkv

_ALONG_TOKENS = 4  # axes of a tensor with one entry for each token, (1, T, H, N)


class Bounds(NamedTuple):
    """Of the sequences that have tokens, int64 (n,) each: their first and last tokens, and their own numbers."""

    starts: Tensor
    ends: Tensor
    filled: Tensor


class Edges(NamedTuple):
    """For each token, int32 (T,): the sequence whose first token it is, and whose last, or -1."""

    starts: Tensor
    ends: Tensor


class SideBySide(NamedTuple):
    """Chunks of all sequences in the order in which they can be scanned side by side.

    First come the first chunks of all sequences that have one, then all second chunks, and so on; the sequences with
    most chunks first, so that those that go on are always the first of those before. A row without tokens is one chunk
    of filling. int64:

    Args:
        counts: how many sequences have a first chunk, a second, ..; n in all.
        slots: of each chunk's tokens the place in the row, T behind a sequence's last token, (n·L,).
        places: of each token its place among the slots, (T,).
        order: the sequences, those without tokens last, (S,).
        after: of each chunk the one behind it, or n + i if it ends the i-th sequence of ``order``, (n,).
    """

    counts: tuple[int, ...]
    slots: Tensor
    places: Tensor
    order: Tensor
    after: Tensor


class Sequences:
    """Where each sequence of a packed row lies. The lengths are known to the host, so that no kernel waits for them.

    Args:
        lengths: tokens of each sequence; zero is allowed.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in self.lengths) or not self.lengths:
            raise ContractError(f"sequences of {self.lengths} tokens")
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._bounds: dict[torch.device, Bounds] = {}
        self._edges: dict[torch.device, Edges] = {}
        self._side_by_side: dict[tuple[int, torch.device], SideBySide] = {}

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each sequence starts, and where the last one ends: S + 1 positions."""
        positions = [0]
        for length in self.lengths:
            positions.append(positions[-1] + length)
        return tuple(positions)

    @property
    def tokens(self) -> int:
        """T, the tokens of all sequences."""
        return self.offsets[-1]

    def bounds(self, device: torch.device) -> Bounds:
        """Where the sequences that have tokens begin and end."""
        if device not in self._bounds:
            filled = [index for index, length in enumerate(self.lengths) if length]
            rows = ([self.offsets[i] for i in filled], [self.offsets[i + 1] - 1 for i in filled], filled)
            self._bounds[device] = Bounds(*(torch.tensor(row, dtype=torch.int64, device=device) for row in rows))
        return self._bounds[device]

    def edges(self, device: torch.device) -> Edges:
        """Which tokens begin and end a sequence."""
        if device not in self._edges:
            starts, ends, filled = self.bounds(torch.device("cpu"))
            table = torch.full((2, self.tokens), -1, dtype=torch.int32)
            for row, places in zip(table, (starts, ends), strict=True):
                row[places] = filled.int()
            self._edges[device] = Edges(*table.to(device).unbind())
        return self._edges[device]

    def chunk_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """How chunks of ``length`` tokens lie in the row, none of them in two sequences.

        Returns: ``chunks`` int32 (n, 3): sequence, first token, tokens (at most ``length``); and ``first`` int32
            (S + 1,): the first chunk of each sequence, and n. A sequence without tokens has no chunk.
        """
        key = (length, device)
        if key not in self._tables:
            chunks = []
            first = [0]
            for sequence, (start, stop) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
                chunks += [(sequence, token, min(length, stop - token)) for token in range(start, stop, length)]
                first.append(len(chunks))
            self._tables[key] = (
                torch.tensor(chunks, dtype=torch.int32, device=device).reshape(-1, 3),
                torch.tensor(first, dtype=torch.int32, device=device),
            )
        return self._tables[key]

    def side_by_side(self, length: int, device: torch.device) -> SideBySide:
        """Chunks of ``length`` tokens, none of them in two sequences, for a scan over all sequences at once."""
        key = (length, device)
        if key not in self._side_by_side:
            made = self._cut_side_by_side(length)
            tables = (table.to(device) for table in made[1:])
            self._side_by_side[key] = SideBySide(made.counts, *tables)
        return self._side_by_side[key]

    def _cut_side_by_side(self, length: int) -> SideBySide:
        chunks = [-(-tokens // length) for tokens in self.lengths]
        if not self.tokens:
            chunks[0] = 1
        order = sorted(range(len(chunks)), key=lambda sequence: -chunks[sequence])
        counts = [sum(own > step for own in chunks) for step in range(max(chunks))]
        first, own, after = [], [], []
        behind = 0
        for step, count in enumerate(counts):
            behind += count
            more = counts[step + 1] if step + 1 < len(counts) else 0
            for rank, sequence in enumerate(order[:count]):
                first.append(self.offsets[sequence] + step * length)
                own.append(min(length, self.lengths[sequence] - step * length))
                after.append(behind + rank if rank < more else sum(counts) + rank)
        token = torch.arange(length)
        slots = torch.tensor(first, dtype=torch.int64)[:, None] + token
        slots = slots.masked_fill(token >= torch.tensor(own, dtype=torch.int64)[:, None], self.tokens).flatten()
        places = torch.empty(self.tokens + 1, dtype=torch.int64)
        places[slots] = torch.arange(len(slots))
        tables = (torch.tensor(table, dtype=torch.int64) for table in (order, after))
        return SideBySide(tuple(counts), slots, places[:-1], *tables)

    def check(self, operator: str, value: Tensor, state: Tensor | None) -> None:
        """Check that a call's tensors are a row of these sequences.

        Args:
            value: must be (1, T, H, N).
            state: must be (S, H, N, N) or None.
        Raises: ContractError otherwise.
        """
        if value.shape[0] != 1 or value.shape[1] != self.tokens:
            raise ContractError(f"{operator}: packed rows are (1, {self.tokens}, H, N), found {tuple(value.shape)}")
        if state is not None and state.shape[0] != len(self.lengths):
            raise ContractError(f"{operator}: {len(self.lengths)} sequences need as many states, found {len(state)}")


def taking_sequences(operator: str, backend: Backend) -> Wkv:
    """The backend's operator, with ``sequences`` as one more argument, None for rows of one sequence each."""

    def run(*, sequences: Sequences | None = None, state: Tensor | None, **operands: Tensor) -> tuple[Tensor, Tensor]:
        if sequences is None:
            return backend.run(**operands, state=state)
        sequences.check(operator, operands["v"], state)
        if backend.packed:
            return backend.run(**operands, state=state, sequences=sequences)
        return _run_apart(backend.run, sequences, state, operands)

    return run


def _run_apart(
    run: Wkv, sequences: Sequences, state: Tensor | None, operands: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Run an operator that knows no packed rows on each sequence alone."""
    read, states = [], []
    for index, (start, stop) in enumerate(zip(sequences.offsets, sequences.offsets[1:], strict=False)):
        own = {
            name: tensor[:, start:stop] if tensor.dim() == _ALONG_TOKENS else tensor
            for name, tensor in operands.items()
        }
        y, after = run(**own, state=None if state is None else state[index : index + 1])
        read.append(y)
        states.append(after)
    return torch.cat(read, 1), torch.cat(states)
