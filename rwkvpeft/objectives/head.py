"""What a model's head is made of, for losses that work on a few rows of its logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkvpeft.models.layers import Linear
from rwkvpeft.quantization.linear import QuantizedLinear


def plain_weight(head: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The weight (V, C) of a head that is nothing but a matrix; None for an adapted one.

    A quantised weight is made in ``dtype``, and lives as long as its caller holds it.
    """
    if isinstance(head, Linear):
        return head.weight
    return head.dequantized(dtype) if isinstance(head, QuantizedLinear) else None


def rows_at_once(asked: int | None, device: torch.device) -> int:
    """Rows of logits that exist at once, if ``asked`` leaves it open."""
    return asked or (256 if device.type == "cpu" else 512)
