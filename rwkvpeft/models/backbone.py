"""The part all versions share: embedding, blocks, final norm, head; recurrent state in and out.

Letters: B batch, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpeft.models.channel_mix import ChannelMixing
from rwkvpeft.models.head_qk import Copies
from rwkvpeft.models.initialise import shared_weights
from rwkvpeft.models.layers import LayerNorm, Linear
from rwkvpeft.models.neftune import add_noise
from rwkvpeft.models.recompute import Level, run_block
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.models.state import BlockState, RecurrentState, fresh_state
from rwkvpeft.ops.block.contract import BlockOps, Mixed
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.sequences import Sequences

Wkv = Callable[..., tuple[Tensor, Tensor]]


class TimeMixing(nn.Module):
    """What every version's time mixing answers to."""

    wkv: Wkv
    time_state: nn.Parameter | None
    shift_state: nn.Parameter | None

    def shift_mixes(self) -> tuple[Tensor | None, ...]:
        """Shares of the previous token in each mixture that ``forward`` takes, (1, 1, C) each; None for zero."""
        raise NotImplementedError

    def forward(
        self, mixed: Mixed, first_value: Tensor | None, state: BlockState, sequences: Sequences | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Mix along time what the token shift has mixed, (B, T, C) each.

        Returns: the update of the residual stream (B, T, C); layer 0's value, which v7's later layers take part of
        (None elsewhere); the memory (B, H, N, N) for the next call.
        """
        raise NotImplementedError

    def recall(self, sequences: Sequences | None, **operands: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the WKV recurrence; a program that knows no packed rows serves all others."""
        return self.wkv(**operands) if sequences is None else self.wkv(**operands, sequences=sequences)

    def initial_memory(self, x: Tensor, memory: Tensor | None, sequences: Sequences | None) -> Tensor | None:
        """The memory to start from: the given one, or the tuned ``time_state`` of each fresh sequence, or None."""
        if memory is None and self.time_state is not None:
            # the recurrence runs in fp32 whatever the activations are, and in fp64 when they are
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            return self.time_state.to(dtype).expand(_starts(x, sequences), -1, -1, -1)
        return memory


class Block(nn.Module):
    """Time mixing, then channel mixing, each on a normed copy and added to the residual stream.

    Without a time mixing there is a second channel mixing in its place, ``ffnPre`` (``--pre_ffn``, block 0 only): of
    the block's state, ``time_shift`` is that one's last normed input then, and ``memory`` stays None. ``dropout`` acts
    on each of the two sums, as in RWKV-LM: on the whole residual stream.
    """

    def __init__(
        self, shape: ModelShape, layer: int, first: TimeMixing | ChannelMixing, ffn: ChannelMixing, ops: BlockOps
    ) -> None:
        super().__init__()
        self.ops = ops
        self.ln0 = LayerNorm(shape.n_embd) if layer == 0 else None
        self.ln1 = LayerNorm(shape.n_embd)
        self.ln2 = LayerNorm(shape.n_embd)
        self.att = first if isinstance(first, TimeMixing) else None
        self.ffnPre = None if isinstance(first, TimeMixing) else first
        self.ffn = ffn
        self.dropout = 0.0

    def forward(
        self, x: Tensor, first_value: Tensor | None, state: BlockState, sequences: Sequences | None = None
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        """Return the residual stream (B, T, C), layer 0's value, and the state after the last token."""
        if self.ln0 is not None:
            x = self.ln0(x)
        state = state._replace(
            time_shift=_first_shift(self._first_mixing(), state.time_shift, x, sequences),
            channel_shift=_first_shift(self.ffn, state.channel_shift, x, sequences),
        )
        mixes = self._first_mixing().shift_mixes()
        mixed = self.ops.norm_mix(x, None, self.ln1.norm(), state.time_shift, mixes, sequences)
        time_shift = mixed.last
        if self.att is not None:
            update, first_value, memory = self.att(mixed, first_value, state, sequences)
        else:
            update, memory = self._first_mixing()(*mixed.tokens), None
        x, addend = self._sum(mixed.residual, update)
        mixes = self.ffn.shift_mixes()
        mixed = self.ops.norm_mix(x, addend, self.ln2.norm(), state.channel_shift, mixes, sequences)
        x = F.dropout(mixed.residual + self.ffn(*mixed.tokens), self.dropout, self.training)
        return x, first_value, BlockState(time_shift, memory, mixed.last)

    def _first_mixing(self) -> TimeMixing | ChannelMixing:
        first = self.att if self.att is not None else self.ffnPre
        assert first is not None
        return first

    def _sum(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual stream and what the next norm adds to it: the norm's own addition is free, if nothing drops."""
        if self.training and self.dropout:
            return F.dropout(x + update, self.dropout), None
        return x, update


def _starts(x: Tensor, sequences: Sequences | None) -> int:
    """Rows of a state: one for each row of tokens, or for each sequence of a packed row."""
    return x.shape[0] if sequences is None else len(sequences.lengths)


def _first_shift(
    mixing: TimeMixing | ChannelMixing, shift: Tensor | None, x: Tensor, sequences: Sequences | None
) -> Tensor | None:
    """The token before the first one (B, C): the given one, or the tuned ``shift_state`` of a fresh sequence."""
    tuned = mixing.shift_state
    if shift is None and tuned is not None:
        return tuned.to(x.dtype).expand(_starts(x, sequences), -1)
    return shift


class Rwkv(nn.Module):
    """An RWKV language model. Parameter names are those of the official checkpoints (see ``models/names.py``).

    A version says what its blocks are made of: ``time_mix(shape, wkv, head_size_divisor, ops)``,
    ``channel_mix(shape, ops)``, and its untrained tensors, ``initial_block(shape, layer)``.

    ``compute_dtype`` is the dtype of the activations; ``recompute`` says what of a block's activations the backward
    pass computes again; ``dropout`` and ``neftune_alpha``, see ``regularise``, act in training only.
    """

    time_mix: ClassVar[type[Any]]
    channel_mix: ClassVar[type[Any]]

    def __init__(
        self, shape: ModelShape, wkv: Wkv, *, head_size_divisor: float = 8, block_ops: BlockOps = PLAIN
    ) -> None:
        super().__init__()

        def block(layer: int) -> Block:
            if layer in shape.time_mixing_layers:
                first = self.time_mix(shape, wkv, head_size_divisor, block_ops)
            else:
                first = self.channel_mix(shape, block_ops)
            return Block(shape, layer, first, self.channel_mix(shape, block_ops), block_ops)

        blocks = [block(layer) for layer in range(shape.n_layer)]
        self.shape = shape
        self.compute_dtype = torch.float32
        self.recompute: Level = "none"
        self.dropout = 0.0
        self.neftune_alpha = 0.0
        self.emb = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.blocks = nn.ModuleList(blocks)
        self.ln_out = LayerNorm(shape.n_embd)
        self.head = Linear(shape.n_embd, shape.vocab_size)
        self.head_q = Linear(shape.n_embd, shape.head_qk) if shape.head_qk else None
        self.head_k = Linear(shape.n_embd, shape.head_qk) if shape.head_qk else None

    @staticmethod
    def initial_block(shape: ModelShape, layer: int) -> dict[str, Tensor]:
        """Untrained tensors of one block, by their names in it."""
        raise NotImplementedError

    @classmethod
    def initial_weights(cls, shape: ModelShape) -> dict[str, Tensor]:
        """Untrained weights as RWKV-LM's trainer of the version draws them; seeded by torch's generator."""
        weights = shared_weights(shape)
        for layer in range(shape.n_layer):
            block = cls.initial_block(shape, layer)
            weights |= {f"blocks.{layer}.{name}": tensor for name, tensor in block.items()}
        return weights

    def regularise(self, *, dropout: float = 0.0, neftune_alpha: float = 0.0) -> None:
        """Set what is random in training.

        Args:
            dropout: share of the embedded tokens, and of the residual stream after each of a block's sums, that is
                put to zero, as in RWKV-LM.
            neftune_alpha: size of NEFTune's noise on the embedded tokens, see ``models/neftune.py``.
        """
        self.dropout, self.neftune_alpha = dropout, neftune_alpha
        for block in self.blocks:
            assert isinstance(block, Block)
            block.dropout = dropout

    def hidden(
        self,
        tokens: Tensor,
        state: RecurrentState | None = None,
        sequences: Sequences | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState]:
        """Run all but the head.

        Args:
            tokens: (B, T) int64.
            state: what earlier tokens left behind; None means a fresh sequence.
            sequences: that ``tokens``, then (1, T), hold one behind another: none sees another, and a state has a row
                for each of them.
            lengths: tokens of each row's, or packed sequence's, document, (B,) or (S,), which NEFTune's noise depends
                on; None means T, or the length of the sequence.
        Returns: (B, T, C) after the final norm, and the state after the last token.
        """
        blocks = (fresh_state(self.shape.n_layer) if state is None else state).blocks
        x = self._embed(tokens, sequences, lengths)
        first_value: Tensor | None = None
        after = []
        differentiates = torch.is_grad_enabled()
        first = self._first_trained(x, blocks) if differentiates else 0
        level = self.recompute if self.training and differentiates else "none"
        for layer, (block, block_state) in enumerate(zip(self.blocks, blocks, strict=True)):
            with torch.set_grad_enabled(differentiates and layer >= first):
                used = "none" if layer < first else level
                x, first_value, left = run_block(block, used, x, first_value, block_state, sequences)
            after.append(left)
        return self.ln_out(x), RecurrentState(tuple(after))

    def _embed(self, tokens: Tensor, sequences: Sequences | None, lengths: Tensor | None) -> Tensor:
        x: Tensor = self.emb(tokens).to(self.compute_dtype)
        if self.training and self.neftune_alpha:
            x = add_noise(x, self.neftune_alpha, sequences, lengths)
        return F.dropout(x, self.dropout, self.training)

    def _first_trained(self, x: Tensor, states: tuple[BlockState, ...]) -> int:
        """The first block that a gradient reaches: nothing of those before it need be kept."""
        if x.requires_grad:
            return 0
        for layer, (block, state) in enumerate(zip(self.blocks, states, strict=True)):
            given = [tensor for tensor in state if tensor is not None]
            if any(tensor.requires_grad for tensor in chain(given, block.parameters())):
                return layer
        return len(self.blocks)

    def forward(self, tokens: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """Logits (B, T, V) of the token after each token, and the state after the last one. See ``hidden``.

        Raises: UserError for headQK and a state, which does not hold the tokens that were read.
        """
        hidden, after = self.hidden(tokens, state)
        copies = self.copies(hidden, tokens, state)
        logits: Tensor = self.head(hidden)
        if copies is not None and tokens.numel():
            logits = copies.add(logits.flatten(0, 1), slice(0, tokens.numel())).view_as(logits)
        return logits, after

    def copies(
        self,
        hidden: Tensor,
        tokens: Tensor,
        state: RecurrentState | None = None,
        sequences: Sequences | None = None,
    ) -> Copies | None:
        """What headQK adds to the logits of ``hidden``, made from ``tokens``; None for a model without it.

        Raises: UserError for headQK and a state, which does not hold the tokens that were read.
        """
        if self.head_q is None or self.head_k is None:
            return None
        if state is not None:
            self.shape.check_recurrent("going on from a state")
        return Copies.of(self.head_q(hidden), self.head_k(hidden), tokens, sequences)
