"""Kernel of wkv5 and wkv6 for the gradients of r, w, k and u in a chunk; letters as in ``diagonal_triton_forward``."""

# Triton reads annotations of constants alone
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from rwkvpeft.ops.diagonal_triton_forward import (
    across_border,
    from_border,
    load_channels,
    load_log_decay,
    summed,
    summed_products,
    to_border,
)
from rwkvpeft.ops.triton_tools import dot, place_of_chunk


@triton.jit(do_not_specialize=["T", "per_row", "levels"])
def gradient_kernel(  # type: ignore[no-untyped-def]
    r, w, k, v, u, dy, states, state_grads, table, dr, dw, dk, du, T, per_row, H, levels,
    N: tl.constexpr, VALUES: tl.constexpr, KEYS: tl.constexpr, L: tl.constexpr,
    PER_HEAD: tl.constexpr, PACKED: tl.constexpr, MODE: tl.constexpr,
):
    """Gradients from the inputs, the states before chunks and the gradients of the states after them.

    The gradient of a decay sums what is read across it. Each term here holds that decay, those of a level as much as
    those through the states: nothing is subtracted, and a strong decay's tiny gradient keeps its digits.

    Grid (chunks · H, N / KEYS key blocks). ``dr``, ``dk`` and ``dw`` are contiguous (rows, T, H, N); ``dw`` is
    (chunks, H, N) fp32 when the decay is ``PER_HEAD``, and so is ``du``: parts of sums over chunks.
    """
    chunk = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first_key = tl.program_id(1) * KEYS
    first, count = place_of_chunk(table, chunk, T, per_row, L, PACKED)
    matrix = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, L)[:, None]
    s = tl.arange(0, L)[None, :]
    channel = first_key + tl.arange(0, KEYS)

    pairs = tl.zeros((L, L), tl.float32)  # dy_t · v_s at (t, s) and at (s, t), t the later token
    dread = tl.zeros((L, KEYS), tl.float32)
    dkept = tl.zeros((L, KEYS), tl.float32)
    across = tl.zeros((KEYS,), tl.float32)
    for first_value in range(0, N, VALUES):
        value = load_channels(v, first, count, head, H, first_value, L, N, VALUES)
        dvalue = load_channels(dy, first, count, head, H, first_value, L, N, VALUES)
        later = dot(dvalue, tl.trans(value), MODE)
        pairs += tl.where(s <= t, later, tl.trans(later))
        inside = (first_value + tl.arange(0, VALUES))[:, None] * N + channel[None, :]
        state = tl.load(states + matrix * (N * N) + inside)
        grad = tl.load(state_grads + matrix * (N * N) + inside)
        dread += dot(dvalue, state, MODE)
        dkept += dot(value, grad, MODE)
        across += tl.sum(state.to(tl.float32) * grad.to(tl.float32), 0)

    receptance = load_channels(r, first, count, head, H, first_key, L, N, KEYS)
    key = load_channels(k, first, count, head, H, first_key, L, N, KEYS)
    logs = load_log_decay(w, first, count, head, H, first_key, L, N, KEYS, PER_HEAD)
    dread *= tl.exp(summed(s < t, logs, MODE))
    dkept *= tl.exp(summed(s > t, logs, MODE))
    dlog = summed_products(s > t, receptance * dread, MODE) + summed_products(s < t, key * dkept, MODE)
    dlog += (across * tl.exp(tl.sum(logs, 0)))[None, :]
    for level in range(0, levels):
        reads = ((t >> level) & 1) == 1
        factor = tl.exp(summed(to_border(level, L), logs, MODE))
        operand = tl.where(reads, receptance, key) * factor
        received = dot(tl.where(across_border(level, L), pairs, 0.0), operand, MODE)
        dlog += summed_products(from_border(level, L), operand * received, MODE)
        received *= factor
        dread += tl.where(reads, received, 0.0)
        dkept += tl.where(reads, 0.0, received)

    own = tl.sum(tl.where(s == t, pairs, 0.0), 1)[:, None]
    bonus = tl.load(u + head * N + channel).to(tl.float32)[None, :]
    tl.store(du + matrix * N + channel, tl.sum(own * receptance * key, 0))
    begin = (first * H + head) * N
    inside = t * (H * N) + channel[None, :]
    tl.store(dr + begin + inside, (dread + own * bonus * key).to(dr.dtype.element_ty), mask=t < count)
    tl.store(dk + begin + inside, (dkept + own * bonus * receptance).to(dk.dtype.element_ty), mask=t < count)
    # once more, rather than in registers all the while
    logs = load_log_decay(w, first, count, head, H, first_key, L, N, KEYS, PER_HEAD)
    if PER_HEAD:
        tl.store(dw + matrix * N + channel, tl.sum(dlog * logs, 0))
    else:
        tl.store(dw + begin + inside, (dlog * logs).to(dw.dtype.element_ty), mask=t < count)
