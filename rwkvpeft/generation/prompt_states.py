"""What a model knows after its prompts, read side by side.

Letters: B prompts, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.errors import ContractError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.state import BlockState, RecurrentState
from rwkvpeft.ops.sequences import Sequences

_SHORTEST_PIECE = 16


class ReadPrompts(NamedTuple):
    """Of each prompt the state behind it, and the logits (B, V) of the token that follows it."""

    state: RecurrentState
    logits: Tensor

    def select(self, rows: Sequence[int]) -> ReadPrompts:
        """Some of the prompts, repeats allowed."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.logits.device)
        return ReadPrompts(self.state.select(index), self.logits.index_select(0, index))

    def put(self, rows: Sequence[int], other: ReadPrompts) -> None:
        """Overwrite some rows with all rows of ``other``, in place."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.logits.device)
        for own, new in zip(self.state.blocks, other.state.blocks, strict=True):
            for tensor, tensor_new in zip(own, new, strict=True):
                if tensor is not None and tensor_new is not None:
                    tensor.index_copy_(0, index, tensor_new.to(tensor.dtype))
        self.logits.index_copy_(0, index, other.logits)


@torch.no_grad()
def read_prompts(model: Rwkv, prompts: Sequence[Sequence[int]], *, tokens_at_once: int) -> ReadPrompts:
    """Read prompts from fresh states, packed into rows of a bounded length; long ones take several such rows.

    Args:
        prompts: at least one, each of at least one token.
        tokens_at_once: tokens of a row; memory grows with it and not with the prompts. With very many prompts each
            gets 16 tokens of a row all the same.
    Raises: ContractError for a prompt without tokens.
    """
    if not all(prompts):
        raise ContractError("a prompt without tokens")
    device = model.emb.weight.device
    piece = max(tokens_at_once // len(prompts), _SHORTEST_PIECE)
    # the longest first: those that go on are always the first of those before
    order = sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))
    state: RecurrentState | None = None
    ended: list[ReadPrompts] = []
    for start in range(0, len(prompts[order[0]]), piece):
        parts = [prompts[prompt][start : start + piece] for prompt in order if len(prompts[prompt]) > start]
        row = torch.tensor([[token for part in parts for token in part]], dtype=torch.int64, device=device)
        sequences = Sequences([len(part) for part in parts])
        hidden, state = model.hidden(row, state, sequences)
        going_on = sum(len(prompts[prompt]) > start + piece for prompt in order)
        last = sequences.bounds(device).ends[going_on:]
        rows = torch.arange(len(parts), device=device)
        if going_on < len(parts):
            ended.append(ReadPrompts(state.select(rows[going_on:]), model.head(hidden[0, last])))
            state = state.select(rows[:going_on])
    # those that ended last were the longest
    together = joined(ended[::-1])
    return together.select([order.index(prompt) for prompt in range(len(prompts))])


def joined(parts: Sequence[ReadPrompts]) -> ReadPrompts:
    """The rows of all parts, one part behind another."""
    if len(parts) == 1:
        return parts[0]
    blocks = (
        BlockState(*(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*layer, strict=True)))
        for layer in zip(*(part.state.blocks for part in parts), strict=True)
    )
    return ReadPrompts(RecurrentState(tuple(blocks)), torch.cat([part.logits for part in parts]))
