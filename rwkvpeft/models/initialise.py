"""Pieces of the initial weights that the versions share. Source: RWKV-LM, ``generate_init_weight`` of each version."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rwkvpeft.models.shape import ModelShape


def depth_ratios(layer: int, n_layer: int) -> tuple[float, float]:
    """How deep a layer sits: rising from 0 to 1, and falling from 1 to almost 0."""
    return layer / max(n_layer - 1, 1), 1 - layer / n_layer


def position(channels: int) -> Tensor:
    """Each channel's place in [0, 1), shaped (1, 1, C) as the token-shift mixes are."""
    return (torch.arange(channels) / channels).view(1, 1, channels)


def orthogonal(rows: int, columns: int, gain: float) -> Tensor:
    """A random matrix whose shorter side is orthogonal with the given gain."""
    return nn.init.orthogonal_(torch.empty(rows, columns), gain=gain)


def shared_weights(shape: ModelShape) -> dict[str, Tensor]:
    """Embedding, head and all norms."""
    head_gain = 0.5 * math.sqrt(max(shape.vocab_size / shape.n_embd, 1))
    weights = {
        "emb.weight": torch.empty(shape.vocab_size, shape.n_embd).uniform_(-1e-4, 1e-4),
        "head.weight": orthogonal(shape.vocab_size, shape.n_embd, head_gain),
    }
    if shape.head_qk:
        weights["head_q.weight"] = torch.zeros(shape.head_qk, shape.n_embd)
        weights["head_k.weight"] = orthogonal(shape.head_qk, shape.n_embd, 0.1)
    norms = ["ln_out", "blocks.0.ln0"]
    norms += [f"blocks.{layer}.{name}" for layer in range(shape.n_layer) for name in ("ln1", "ln2")]
    for norm in norms:
        weights |= {f"{norm}.weight": torch.ones(shape.n_embd), f"{norm}.bias": torch.zeros(shape.n_embd)}
    for layer in shape.time_mixing_layers:
        scale = ((1 + layer) / shape.n_layer) ** 0.7
        weights[f"blocks.{layer}.att.ln_x.weight"] = torch.full((shape.dim_att,), scale)
        weights[f"blocks.{layer}.att.ln_x.bias"] = torch.zeros(shape.dim_att)
    return weights


def decay_and_bonus(shape: ModelShape, layer: int) -> tuple[Tensor, Tensor]:
    """v5's and v6's initial decay logits and bonus, (C,) each."""
    rising, _ = depth_ratios(layer, shape.n_layer)
    channel = torch.arange(shape.dim_att)
    ramp = channel / max(shape.dim_att - 1, 1)
    decay = -6 + 5 * ramp ** (0.7 + 1.3 * rising)
    bonus = rising * (1 - ramp) + ((channel + 1) % 3 - 1) * 0.1
    return decay, bonus
