"""The order of samples: pure functions of a position, the same on every machine.

A position counts the samples of the whole run, over all ranks. Nothing here keeps a state, so a run goes on from one
integer. Only integer arithmetic is used, which no library version changes.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_ROUNDS = 8


def mix(*values: int) -> int:
    """A 64-bit hash of integers. Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def sample_index(position: int, n: int, seed: int, shuffle: bool) -> int:
    """The sample at a position: every pass of ``n`` positions holds each sample once.

    Args:
        position: at least 0; pass p = position // n has its own order, which depends on ``seed`` and p alone.
        n: number of samples, at least 1.
        shuffle: False gives the file's order in every pass.
    """
    passed, index = divmod(position, n)
    return permute(index, n, mix(seed, passed)) if shuffle else index


def permute(index: int, n: int, key: int) -> int:
    """Where a keyed permutation of range(n) takes ``index``, in constant memory.

    A Feistel network permutes the numbers of as many bits as n needs; a result beyond n is permuted again until it
    falls inside, which keeps the whole a permutation. Source: Black and Rogaway, CT-RSA 2002, section 4.
    """
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    keys = _round_keys(key)
    while True:
        high, low = index >> low_bits, index & (1 << low_bits) - 1
        high_width, low_width = bits - low_bits, low_bits
        for round_key in keys:
            high, low = low, high ^ mix(round_key, low) & (1 << high_width) - 1
            high_width, low_width = low_width, high_width
        index = high << low_width | low
        if index < n:
            return index


def sample_indices(positions: NDArray[np.int64], n: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
    """``sample_index`` of many positions, ascending and without gaps, at once."""
    passes, indices = np.divmod(positions, n)
    if not shuffle or not len(positions):
        return indices
    bounds = [*np.flatnonzero(np.diff(passes, prepend=passes[0] - 1)).tolist(), len(positions)]
    parts = [
        permute_many(indices[begin:end], n, mix(seed, int(passes[begin])))
        for begin, end in itertools.pairwise(bounds)
    ]
    return np.concatenate(parts)


def permute_many(indices: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """``permute`` of many numbers at once, in a small part of the time."""
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    # what ``mix`` has made of a round's key before it comes to the number, which is then the same for all numbers
    begun = [mix(round_key) for round_key in _round_keys(key)]
    permuted = indices.astype(np.uint64)
    outside = np.arange(len(permuted))
    while len(outside):
        found = _permute_once(permuted[outside], low_bits, bits - low_bits, begun)
        permuted[outside] = found
        outside = outside[found >= n]
    return permuted.astype(np.int64)


def _permute_once(
    values: NDArray[np.uint64], low_bits: int, high_bits: int, begun: list[int]
) -> NDArray[np.uint64]:
    shift = np.uint64(low_bits)
    high, low = values >> shift, values & np.uint64((1 << low_bits) - 1)
    high_width, low_width = high_bits, low_bits
    for start in begun:
        hashed = (np.uint64(start) ^ low) + np.uint64(0x9E3779B97F4A7C15)
        hashed = (hashed ^ hashed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        hashed = (hashed ^ hashed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        hashed ^= hashed >> np.uint64(31)
        high, low = low, high ^ hashed & np.uint64((1 << high_width) - 1)
        high_width, low_width = low_width, high_width
    return high << shift | low


@lru_cache(maxsize=8)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(mix(key, number) for number in range(_ROUNDS))


def random_start(position: int, last: int, seed: int, attempt: int = 0) -> int:
    """A uniform number in [0, last] for a position; ``attempt`` gives further independent ones."""
    # a product instead of a remainder: no bias that a remainder of 64 bits would have
    return mix(seed, position, attempt) * (last + 1) >> 64


def magic_prime_window(position: int, prime: int) -> int:
    """RWKV-LM's order: the window at a position, ``floor(prime * golden ratio') * i^3 mod prime``, i = position + 1.

    Each ``prime`` positions visit every window once, because cubing permutes the remainders of a prime 3k + 2.
    RWKV-LM's i is 1 + epoch * 40320 + index * world_size + rank, the number of samples drawn before, plus 1.
    Source: RWKV-LM, ``RWKV-v7/train_temp/src/dataset.py``.
    """
    factor = int(prime * (math.sqrt(5) - 1) / 2)
    return factor * (position + 1) ** 3 % prime
