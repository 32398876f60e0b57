"""The prime that orders windows of text in pre-training."""

from __future__ import annotations


def magic_prime(n_tokens: int, ctx_len: int) -> int | None:
    """The largest prime of the form 3n + 2 not above ``n_tokens // ctx_len - 1``.

    For such a prime p, i -> i^3 mod p visits every window number below p once, which is RWKV-LM's order of windows.
    Returns: None if the data hold fewer than three windows; from there on there always is one (2).
    Source: RWKV-LM, ``RWKV-v5/make_data.py``.
    """
    candidate = n_tokens // ctx_len - 1
    candidate -= (candidate - 2) % 3
    while candidate >= 2:
        if is_prime(candidate):
            return candidate
        candidate -= 3
    return None


def is_prime(number: int) -> bool:
    """Trial division: number of windows never exceeds 1e12, for which a million steps do."""
    if number < 4:
        return number > 1
    if number % 2 == 0 or number % 3 == 0:
        return False
    divisor = 5
    while divisor * divisor <= number:
        if number % divisor == 0 or number % (divisor + 2) == 0:
            return False
        divisor += 6
    return True
