"""What a block computes between its matrix products, as a set of operators that two programs provide.

Letters: B batch, T tokens, C channels, H heads, N head size. Activations are of one floating dtype, the results too;
parameters are of any, shaped (C,) or (1, 1, C). Everything is differentiable, T may be 0. A ``last`` token is what the
token shift finds before the first one: (B, C), possibly expanded, None for zeros. ``sequences`` tells that the batch is
one packed row of S of them, each with a first token of its own: B is 1, and ``last`` is (S, C).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from rwkvpeft.ops.contract import Supports
from rwkvpeft.ops.sequences import Sequences


class Norm(NamedTuple):
    """A layer norm, or a group norm with one group a head: ``weight`` and ``bias`` of (C,), ``eps`` in its variance."""

    weight: Tensor
    bias: Tensor
    eps: float


class Mixed(NamedTuple):
    """``residual`` (B, T, C); ``tokens``, one (B, T, C) for each mix; ``last``, the last normed token (B, C).

    ``towards`` (B, T, C): predecessor - token for ``MixByToken``, from a program that has it at hand.
    """

    residual: Tensor
    tokens: tuple[Tensor, ...]
    last: Tensor | None
    towards: Tensor | None = None


class NormMix(Protocol):
    """Add to the residual stream, normalise, and move each token towards its predecessor."""

    def __call__(
        self,
        x: Tensor,
        update: Tensor | None,
        norm: Norm,
        last: Tensor | None,
        mixes: tuple[Tensor | None, ...],
        sequences: Sequences | None = None,
    ) -> Mixed:
        """Compute residual = x + update, n = norm(residual), and n + (predecessor of n - n) * mix for each mix.

        Args:
            x, update: (B, T, C); no update leaves the residual stream as it is.
            last: a normed token.
            mixes: at most six shares of the predecessor; None stands for a share of zero.
        Returns: the last token is ``last`` when T = 0.
        """


class MixByToken(Protocol):
    """Move each token towards its predecessor by shares that each token has of its own (v6)."""

    def __call__(
        self,
        x: Tensor,
        towards: Tensor | None,
        last: Tensor | None,
        shares: Tensor,
        mixes: tuple[Tensor, ...],
        sequences: Sequences | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute x + (predecessor of x - x) * (mix + share) for each of five mixes.

        Args:
            x: (B, T, C). shares: (5, B, T, C).
            towards: what the same program's ``norm_mix`` returned beside x.
        """


class KeyParameters(NamedTuple):
    """v7's parameters of its keys, (1, 1, C) each, by their names in a checkpoint."""

    a0: Tensor
    k_k: Tensor
    k_a: Tensor
    v0: Tensor


class PreparedKeys(NamedTuple):
    """What v7's memory is updated with, (B, T, H, N) each: ``remove`` is -κ, ``write`` κ times the learning rate."""

    key: Tensor
    value: Tensor
    remove: Tensor
    write: Tensor


class PrepareKeys(Protocol):
    """v7's value, keys and removal key, from what its matrices give."""

    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        rate_logit: Tensor,
        first_value: Tensor | None,
        share_logit: Tensor | None,
        parameters: KeyParameters,
        heads: int,
    ) -> PreparedKeys:
        """Compute, with rate = sigmoid(rate_logit + a0) and κ = key * k_k normalised in each head:

        the key, key * (1 + (rate - 1) * k_a); the value, moved towards layer 0's by sigmoid(share_logit + v0); -κ; and
        κ * rate.

        Args:
            key, value, rate_logit: (B, T, C).
            first_value, share_logit: (B, T, C); None in layer 0, whose value stays as it is.
        """


class NormBonusGate(Protocol):
    """v7's end of the time mixing, before its last matrix."""

    def __call__(
        self, read: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, norm: Norm, r_k: Tensor
    ) -> Tensor:
        """Compute (norm(read) + (Σ r k r_k) v) * gate, norm and sum in each head.

        Args:
            read, r, k, v: (B, T, H, N). gate: (B, T, C). r_k: (H, N).
        Returns: (B, T, C).
        """


class NormGate(Protocol):
    """v5's and v6's end of the time mixing, before its last matrix."""

    def __call__(self, read: Tensor, gate: Tensor, norm: Norm) -> Tensor:
        """Compute norm(read) * SiLU(gate), the norm in each head.

        Args:
            read: (B, T, H, N). gate: (B, T, C).
        Returns: (B, T, C).
        """


class SquaredRelu(Protocol):
    """The activation of the channel mixing."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute relu(x)²."""


class GateValue(Protocol):
    """v5's and v6's end of the channel mixing."""

    def __call__(self, receptance: Tensor, value: Tensor) -> Tensor:
        """Compute sigmoid(receptance) * value, both (B, T, C)."""


@dataclass(frozen=True)
class BlockOps:
    """One program for all of a block's operators.

    Args:
        name: the value of the flag that asks for it.
        summary: a few words on what it is, for the start report.
        supports: which runs it can serve.
    """

    name: str
    summary: str
    supports: Supports
    norm_mix: NormMix
    mix_by_token: MixByToken
    prepare_keys: PrepareKeys
    norm_bonus_gate: NormBonusGate
    norm_gate: NormGate
    squared_relu: SquaredRelu
    gate_value: GateValue
