"""The kernels of ``triton_norm_mix.py``, which says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from rwkvpeft.ops.block.triton_tiles import (
    load_numbered_row,
    load_optional_row,
    load_row,
    store_numbered_row,
    store_row,
)


@triton.jit
def _residual_row(x, update, offset, cols, inside):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = load_row(x, offset, cols, inside)
    if update is not None:
        # rounded as it is stored: the backward pass finds it so
        row = (row + load_row(update, offset, cols, inside)).to(x.dtype.element_ty).to(tl.float32)
    return row


@triton.jit
def _normed(row, weight, bias, cols, inside, C, eps):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    mean = tl.sum(row, axis=0) / C
    away = tl.where(inside, row - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(away * away, axis=0) / C + eps)
    # weight and bias are loaded for each token: they come from the cache, and the registers are needed for more warps
    return away * scale * load_row(weight, 0, cols, inside) + load_row(bias, 0, cols, inside), mean, scale


@triton.jit
def _mix(out, share, offset, cols, inside, row, towards):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    mixed = row + towards * load_optional_row(share, 0, cols, inside)
    store_row(out, offset, cols, inside, mixed)


@triton.jit(do_not_specialize=["T", "each"])
def forward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    x, update, residual, weight, bias, last, s0, s1, s2, s3, s4, s5,  # noqa: ANN001
    out0, out1, out2, out3, out4, out5, after, stats, starts, ends, T, C, eps, each,  # noqa: ANN001
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):
    """Programs (neighbouring tokens, row): residual stream, mixtures, the last normed token, statistics."""
    batch = tl.program_id(1)
    start = tl.program_id(0) * each
    end = tl.minimum(start + each, T)
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    first = batch.to(tl.int64) * T
    tokens = tl.num_programs(1).to(tl.int64) * T

    row = _residual_row(x, update, (first + tl.maximum(start - 1, 0)) * C, cols, inside)
    before, _, _ = _normed(row, weight, bias, cols, inside, C, eps)
    before = tl.where(start > 0, before, load_optional_row(last, batch.to(tl.int64) * C, cols, inside))
    for token in range(start, end):
        offset = (first + token) * C
        row = _residual_row(x, update, offset, cols, inside)
        if update is not None:
            store_row(residual, offset, cols, inside, row)
        row, mean, scale = _normed(row, weight, bias, cols, inside, C, eps)
        tl.store(stats + first + token, mean)
        tl.store(stats + tokens + first + token, scale)
        if starts is not None:
            sequence = tl.load(starts + token)
            before = tl.where(sequence >= 0, load_numbered_row(last, sequence, C, cols), before)
            store_numbered_row(after, tl.load(ends + token), C, cols, row)
        towards = before - row
        _mix(out0, s0, offset, cols, inside, row, towards)
        if COUNT > 1:
            _mix(out1, s1, offset, cols, inside, row, towards)
        if COUNT > 2:
            _mix(out2, s2, offset, cols, inside, row, towards)
        if COUNT > 3:
            _mix(out3, s3, offset, cols, inside, row, towards)
        if COUNT > 4:
            _mix(out4, s4, offset, cols, inside, row, towards)
        if COUNT > 5:
            _mix(out5, s5, offset, cols, inside, row, towards)
        before = row
    if starts is None:  # noqa: SIM102 of a packed row the compiler must not see what is inside
        if end == T:
            store_row(after, batch.to(tl.int64) * C, cols, inside, before)


@triton.jit
def _spread(grad, share, offset, cols, inside, own, passed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Add what a mixture's gradient says of its token, and of the token before."""
    row = load_row(grad, offset, cols, inside)
    part = row * load_optional_row(share, 0, cols, inside)
    return own + (row - part), passed + part


@triton.jit
def _spread_all(  # type: ignore[no-untyped-def]  # noqa: ANN202
    g0, g1, g2, g3, g4, g5, s0, s1, s2, s3, s4, s5, offset, cols, inside, own, COUNT: tl.constexpr,  # noqa: ANN001
):
    passed = cols.to(tl.float32) * 0.0
    own, passed = _spread(g0, s0, offset, cols, inside, own, passed)
    if COUNT > 1:
        own, passed = _spread(g1, s1, offset, cols, inside, own, passed)
    if COUNT > 2:
        own, passed = _spread(g2, s2, offset, cols, inside, own, passed)
    if COUNT > 3:
        own, passed = _spread(g3, s3, offset, cols, inside, own, passed)
    if COUNT > 4:
        own, passed = _spread(g4, s4, offset, cols, inside, own, passed)
    if COUNT > 5:
        own, passed = _spread(g5, s5, offset, cols, inside, own, passed)
    return own, passed


@triton.jit(do_not_specialize=["T", "each"])
def backward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    residual, stats, weight, s0, s1, s2, s3, s4, s5, g0, g1, g2, g3, g4, g5,  # noqa: ANN001
    grad_residual, grad_after, grad_x, grad_last, starts, ends, T, C, each,  # noqa: ANN001
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):
    """Programs (neighbouring tokens, row), from the last token to the first: gradients of x and of the token before."""
    batch = tl.program_id(1)
    start = tl.program_id(0) * each
    end = tl.minimum(start + each, T)
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    first = batch.to(tl.int64) * T
    tokens = tl.num_programs(1).to(tl.int64) * T
    row_of_batch = batch.to(tl.int64) * C

    # what the token after this program's last one gives to it
    passes = end < T
    if starts is not None:
        passes = tl.load(starts + end, mask=passes, other=0) < 0
    follows = cols < tl.where(passes, C, 0)
    zeros = tl.zeros([BLOCK], tl.float32)
    _, passed = _spread_all(
        g0, g1, g2, g3, g4, g5, s0, s1, s2, s3, s4, s5, (first + end) * C, cols, follows, zeros, COUNT
    )
    if starts is None:
        passed += load_optional_row(grad_after, row_of_batch, cols, cols < tl.where(end == T, C, 0))
    for step in range(0, end - start):
        token = end - 1 - step
        offset = (first + token) * C
        if starts is not None:
            passed += load_numbered_row(grad_after, tl.load(ends + token), C, cols)
        own, passed = _spread_all(
            g0, g1, g2, g3, g4, g5, s0, s1, s2, s3, s4, s5, offset, cols, inside, passed, COUNT
        )
        own *= load_row(weight, 0, cols, inside)
        scale = tl.load(stats + tokens + first + token)
        row = (load_row(residual, offset, cols, inside) - tl.load(stats + first + token)) * scale
        own = scale * (own - tl.sum(own, axis=0) / C - row * (tl.sum(own * row, axis=0) / C))
        own += load_optional_row(grad_residual, offset, cols, inside)
        store_row(grad_x, offset, cols, inside, own)
        if starts is not None:
            sequence = tl.load(starts + token)
            if grad_last is not None:
                store_numbered_row(grad_last, sequence, C, cols, passed)
            passed = tl.where(sequence >= 0, 0.0, passed)
    if starts is None and grad_last is not None:  # noqa: SIM102 where it is None, the compiler must not see inside
        if start == 0:
            store_row(grad_last, row_of_batch, cols, inside, passed)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]  # noqa: ANN202
    grad, share, offset, cols, inside, row, before, towards, has_before, total, sum_gamma, sum_beta,  # noqa: ANN001
):
    """Add what a mixture's gradient at one token says of its share and of the norm's weight and bias."""
    given = load_row(grad, offset, cols, inside)
    part = given * load_optional_row(share, 0, cols, inside)
    sum_gamma += given * row + part * (before - row)
    sum_beta += given + part * (has_before - 1.0)
    return total + given * towards, sum_gamma, sum_beta


@triton.jit(do_not_specialize=["T", "each"])
def parameters_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    residual, stats, weight, bias, last, s0, s1, s2, s3, s4, s5, g0, g1, g2, g3, g4, g5,  # noqa: ANN001
    grad_after, partial, starts, ends, T, C, each, COUNT: tl.constexpr, BLOCK: tl.constexpr,  # noqa: ANN001
):
    """Programs (neighbouring tokens, row, channels): their sums for the gradients of weight, bias and shares."""
    batch = tl.program_id(1)
    chunk = tl.program_id(0)
    start = chunk * each
    end = tl.minimum(start + each, T)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    first = batch.to(tl.int64) * T
    tokens = tl.num_programs(1).to(tl.int64) * T
    row_of_batch = batch.to(tl.int64) * C
    gamma = load_row(weight, 0, cols, inside)
    beta = load_row(bias, 0, cols, inside)
    before_all = load_optional_row(last, row_of_batch, cols, inside)
    zeros = tl.zeros([BLOCK], tl.float32)
    sum_gamma, sum_beta, sum0, sum1, sum2, sum3, sum4, sum5 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros

    # the normed token before, without weight and bias
    earlier = first + tl.maximum(start - 1, 0)
    before = load_row(residual, earlier * C, cols, inside) - tl.load(stats + earlier)
    before = tl.where(start > 0, before * tl.load(stats + tokens + earlier), 0.0)
    for token in range(start, end):
        offset = (first + token) * C
        row = (load_row(residual, offset, cols, inside) - tl.load(stats + first + token))
        row *= tl.load(stats + tokens + first + token)
        follows = token > 0
        if starts is not None:
            sequence = tl.load(starts + token)
            follows = sequence < 0
            before = tl.where(follows, before, 0.0)
            before_all = load_numbered_row(last, sequence, C, cols)
            given = load_numbered_row(grad_after, tl.load(ends + token), C, cols)
            sum_gamma += given * row
            sum_beta += given
        has_before = tl.where(follows, 1.0, 0.0)
        towards = tl.where(follows, before * gamma + beta, before_all) - (row * gamma + beta)
        sum0, sum_gamma, sum_beta = _gather(
            g0, s0, offset, cols, inside, row, before, towards, has_before, sum0, sum_gamma, sum_beta
        )
        if COUNT > 1:
            sum1, sum_gamma, sum_beta = _gather(
                g1, s1, offset, cols, inside, row, before, towards, has_before, sum1, sum_gamma, sum_beta
            )
        if COUNT > 2:
            sum2, sum_gamma, sum_beta = _gather(
                g2, s2, offset, cols, inside, row, before, towards, has_before, sum2, sum_gamma, sum_beta
            )
        if COUNT > 3:
            sum3, sum_gamma, sum_beta = _gather(
                g3, s3, offset, cols, inside, row, before, towards, has_before, sum3, sum_gamma, sum_beta
            )
        if COUNT > 4:
            sum4, sum_gamma, sum_beta = _gather(
                g4, s4, offset, cols, inside, row, before, towards, has_before, sum4, sum_gamma, sum_beta
            )
        if COUNT > 5:
            sum5, sum_gamma, sum_beta = _gather(
                g5, s5, offset, cols, inside, row, before, towards, has_before, sum5, sum_gamma, sum_beta
            )
        before = row
    if starts is None:
        given = load_optional_row(grad_after, row_of_batch, cols, cols < tl.where(end == T, C, 0))
        sum_gamma += given * before
        sum_beta += given

    partial += (batch.to(tl.int64) * tl.num_programs(0) + chunk) * (COUNT + 2) * C + cols
    tl.store(partial, sum_gamma, mask=inside)
    tl.store(partial + C, sum_beta, mask=inside)
    tl.store(partial + 2 * C, sum0, mask=inside)
    if COUNT > 1:
        tl.store(partial + 3 * C, sum1, mask=inside)
    if COUNT > 2:
        tl.store(partial + 4 * C, sum2, mask=inside)
    if COUNT > 3:
        tl.store(partial + 5 * C, sum3, mask=inside)
    if COUNT > 4:
        tl.store(partial + 6 * C, sum4, mask=inside)
    if COUNT > 5:
        tl.store(partial + 7 * C, sum5, mask=inside)
