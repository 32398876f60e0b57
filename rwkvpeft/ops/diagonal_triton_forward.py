"""Kernels of wkv5 and wkv6 over chunks of tokens: what a chunk adds, the states between chunks, what tokens read.

Letters: T tokens, H heads, N head size, L tokens in a chunk, ℓ a log decay, S a state (N values, N keys).

A token t reads token s < t through e^(sum of ℓ strictly between them). Decays have no bound, so no factor may grow: a
chunk is halved again and again. On level i, blocks of 2^i tokens come in pairs; a token of a second block reads one
of the first through e^(sum from the border to t) · e^(sum from s to the border), both at most 1. Every pair of tokens
is on exactly one level, that of the highest bit in which their places differ. The sums are products with matrices of
zeros and ones, never differences, so that a strong decay costs its weak neighbours no digits.

The gradient of v is the same computation backwards in time, and so are its states: each kernel serves both ways.
"""

# Triton reads annotations of constants alone
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from rwkvpeft.ops.triton_tools import chunks_of_sequence, dot, place_of_chunk


@triton.jit
def load_channels(  # type: ignore[no-untyped-def]
    pointer, first, count, head, heads, channel, L: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    """Channels ``channel ..`` of ``count`` tokens of a contiguous (tokens, H, N): (L, BLOCK) in fp32, zeros behind."""
    token = tl.arange(0, L)[:, None]
    pointer += (first * heads + head) * N + channel
    inside = token * (heads * N) + tl.arange(0, BLOCK)[None, :]
    return tl.load(pointer + inside, mask=token < count, other=0.0).to(tl.float32)


@triton.jit
def load_log_decay(  # type: ignore[no-untyped-def]
    w, first, count, head, heads, channel, L: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PER_HEAD: tl.constexpr
):
    """ℓ = -e^w, 0 behind the last token, (L, BLOCK); ``w`` is (tokens, H, N), or (H, N) when ``PER_HEAD``.

    e^-150 is 0 in fp32: below it decays do not differ, and none is -inf.
    """
    if PER_HEAD:
        exponent = tl.load(w + head * N + channel + tl.arange(0, BLOCK)).to(tl.float32)[None, :]
    else:
        exponent = load_channels(w, first, count, head, heads, channel, L, N, BLOCK)
    return tl.where(tl.arange(0, L)[:, None] < count, tl.maximum(-tl.exp(exponent), -150.0), 0.0)


@triton.jit
def summed(chosen, x, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of those rows of ``x`` that a matrix of truths chooses, in fp32; for bf16 products 16 bits of terms count.

    A number is the sum of two or three bf16 ones, whose products with 1 are exact.
    """
    ones = tl.where(chosen, 1.0, 0.0)
    if MODE == "fp32":
        total = dot(ones, x, MODE)
    else:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        total = dot(ones, high, "bf16") + dot(ones, rest, "bf16")
        if MODE != "bf16":
            total += dot(ones, rest - rest.to(tl.bfloat16).to(tl.float32), "bf16")
    return total


@triton.jit
def summed_products(chosen, x, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """As ``summed``, of products that are no more exact than an operand of ``MODE``."""
    if MODE == "bf16":
        total = dot(tl.where(chosen, 1.0, 0.0), x, MODE)
    else:
        total = summed(chosen, x, MODE)
    return total


@triton.jit
def block_of(level, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens of a chunk, whether each is in a second block of 2^level, and where its block begins: (L, 1) each.

    Masks are made of these anew on each level: what they have in common would be kept in registers between levels.
    """
    token = tl.arange(0, L)[:, None]
    block = token >> level
    return token, (block & 1) == 1, block << level


@triton.jit
def to_border(level, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which tokens (columns) lie between a token (rows) and the border of its pair of blocks, (L, L)."""
    token, second, begin = block_of(level, L)
    other = tl.arange(0, L)[None, :]
    return (other >= tl.where(second, begin, token + 1)) & (other < tl.where(second, token, begin + (1 << level)))


@triton.jit
def from_border(level, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """The transposed: tokens (columns) between which and the border a token (rows) lies, (L, L)."""
    token, second, begin = block_of(level, L)
    other = tl.arange(0, L)[None, :]
    return (other >= tl.where(second, token + 1, begin)) & (other < tl.where(second, begin + (1 << level), token))


@triton.jit
def across_border(level, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens (columns) in the other block of a token's (rows) pair, (L, L)."""
    _, second, begin = block_of(level, L)
    other = tl.arange(0, L)[None, :]
    start = tl.where(second, begin - (1 << level), begin + (1 << level))
    return (other >= start) & (other < start + (1 << level))


@triton.jit(do_not_specialize=["T", "per_row"])
def contribution_kernel(  # type: ignore[no-untyped-def]
    values, keys, w, table, contributions, decays, T, per_row, H,
    N: tl.constexpr, VALUES: tl.constexpr, KEYS: tl.constexpr, L: tl.constexpr, PER_HEAD: tl.constexpr,
    PACKED: tl.constexpr, BACKWARD: tl.constexpr, MODE: tl.constexpr,
):
    """What a chunk adds to the state after it, and by how much it decays the one before it.

    Forward: ``values`` are v and ``keys`` are k, each decayed to the chunk's end. ``BACKWARD``: dy and r, decayed to
    its start. Grid (chunks · H, N / VALUES value blocks, N / KEYS key blocks); ``contributions`` (chunks, H, N, N),
    ``decays`` (chunks, H, N), both fp32.
    """
    chunk = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first_value = tl.program_id(1) * VALUES
    first_key = tl.program_id(2) * KEYS
    first, count = place_of_chunk(table, chunk, T, per_row, L, PACKED)
    value = load_channels(values, first, count, head, H, first_value, L, N, VALUES)
    key = load_channels(keys, first, count, head, H, first_key, L, N, KEYS)
    logs = load_log_decay(w, first, count, head, H, first_key, L, N, KEYS, PER_HEAD)
    t = tl.arange(0, L)[:, None]
    s = tl.arange(0, L)[None, :]
    if BACKWARD:
        sums = summed(s < t, logs, MODE)
    else:
        sums = summed(s > t, logs, MODE)
    added = dot(tl.trans(value), key * tl.exp(sums), MODE)
    matrix = tl.program_id(0).to(tl.int64)
    channel = first_key + tl.arange(0, KEYS)
    inside = (first_value + tl.arange(0, VALUES))[:, None] * N + channel[None, :]
    tl.store(contributions + matrix * (N * N) + inside, added)
    if tl.program_id(1) == 0:
        tl.store(decays + matrix * N + channel, tl.exp(tl.sum(logs, 0)))


@triton.jit(do_not_specialize=["per_row"])
def scan_kernel(  # type: ignore[no-untyped-def]
    contributions, decays, given, first_chunks, states, last, per_row, H,
    N: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, GIVEN: tl.constexpr, BACKWARD: tl.constexpr,
):
    """The state before each chunk and after the last; ``BACKWARD``: its gradient after each chunk and before the first.

    ``given`` (rows, H, N, N) is where it starts, zeros unless ``GIVEN``. Grid (rows · H, N / ROWS): value rows of a
    state do not know each other. ``states`` (chunks, H, N, N), ``last`` (rows, H, N, N).
    """
    row = tl.program_id(0) // H
    head = tl.program_id(0) % H
    begin, end = chunks_of_sequence(first_chunks, row, per_row, PACKED)
    value = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    key = tl.arange(0, N)[None, :]
    inside = value * N + key
    state = tl.zeros((ROWS, N), tl.float32)
    if GIVEN:
        state += tl.load(given + tl.program_id(0).to(tl.int64) * N * N + inside).to(tl.float32)
    for index in range(0, end - begin):
        chunk = begin + index
        if BACKWARD:
            chunk = end - 1 - index
        matrix = chunk.to(tl.int64) * H + head
        tl.store(states + matrix * (N * N) + inside, state.to(states.dtype.element_ty))
        decay = tl.load(decays + matrix * N + key)
        state = state * decay + tl.load(contributions + matrix * (N * N) + inside)
    tl.store(last + tl.program_id(0).to(tl.int64) * N * N + inside, state)


@triton.jit(do_not_specialize=["T", "per_row", "levels"])
def read_kernel(  # type: ignore[no-untyped-def]
    r, w, k, values, u, states, table, out, T, per_row, H, levels,
    N: tl.constexpr, VALUES: tl.constexpr, KEYS: tl.constexpr, L: tl.constexpr,
    PER_HEAD: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, MODE: tl.constexpr,
):
    """What tokens read of their own chunk and of the state before it.

    Forward: y, ``values`` being v. ``BACKWARD``: dv, ``values`` being dy and ``states`` their gradients after chunks.
    Grid (chunks · H, N / VALUES value blocks); L = 2^LEVELS; ``out`` is a contiguous (rows, T, H, N).
    """
    chunk = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first_value = tl.program_id(1) * VALUES
    first, count = place_of_chunk(table, chunk, T, per_row, L, PACKED)
    matrix = tl.program_id(0).to(tl.int64) * N * N
    t = tl.arange(0, L)[:, None]
    s = tl.arange(0, L)[None, :]
    value_channel = first_value + tl.arange(0, VALUES)[None, :]
    weights = tl.zeros((L, L), tl.float32)
    own = tl.zeros((L,), tl.float32)
    read = tl.zeros((L, VALUES), tl.float32)
    for first_key in range(0, N, KEYS):
        receptance = load_channels(r, first, count, head, H, first_key, L, N, KEYS)
        key = load_channels(k, first, count, head, H, first_key, L, N, KEYS)
        logs = load_log_decay(w, first, count, head, H, first_key, L, N, KEYS, PER_HEAD)
        channel = first_key + tl.arange(0, KEYS)
        bonus = tl.load(u + head * N + channel).to(tl.float32)
        own += tl.sum(receptance * bonus[None, :] * key, 1)
        for level in range(0, levels):
            operand = tl.where(((t >> level) & 1) == 1, receptance, key)
            operand *= tl.exp(summed(to_border(level, L), logs, MODE))
            weights += tl.where(across_border(level, L), dot(operand, tl.trans(operand), MODE), 0.0)
        if BACKWARD:
            outward = key * tl.exp(summed(s > t, logs, MODE))
        else:
            outward = receptance * tl.exp(summed(s < t, logs, MODE))
        inside = value_channel * N + channel[:, None]
        read += dot(outward, tl.load(states + matrix + inside), MODE)
    if BACKWARD:
        weights = tl.where(s > t, weights, 0.0)
    else:
        weights = tl.where(s < t, weights, 0.0)
    weights = tl.where(s == t, own[:, None], weights)
    value = load_channels(values, first, count, head, H, first_value, L, N, VALUES)
    read += dot(weights, value, MODE)
    out += (first * H + head) * N
    tl.store(out + t * (H * N) + value_channel, read.to(out.dtype.element_ty), mask=t < count)
