"""How a block's kernels cut their work."""

from __future__ import annotations


def tokens_each(batch: int, tokens: int, *, programs: int) -> int:
    """Neighbouring tokens of a sequence one program takes, so that there are about so many programs; at most 32."""
    return max(1, min(32, tokens, -(-batch * tokens // programs)))
