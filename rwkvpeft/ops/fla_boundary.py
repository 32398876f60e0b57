"""Between our operators and flash-linear-attention's.

What differs there: a state is (S, H, N keys, N values) where ours is (S, H, N values, N keys); decays are given as
their logarithms; a packed row is told by the offsets of its sequences, none of them empty; activations are 16-bit and
all of one dtype.

Its kernels run under autograd functions of its own, so that ``--grad_cp selective`` computes their forward pass twice,
and they need data: memory is predicted as for our Triton kernels.

Source: the naive recurrences beside its kernels, fla/ops/generalized_delta_rule/dplr/naive.py and
fla/ops/rwkv6/recurrent_naive.py, whose query is multiplied by the ``scale`` that we give as 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rwkvpeft.ops.contract import Supports
from rwkvpeft.ops.sequences import Sequences

SUPPORTS = Supports(
    device_types=frozenset({"cuda"}),
    # its documentation warns of fp32
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    head_sizes=frozenset({16, 32, 64, 128, 256}),
)

Kernel = Callable[..., tuple[Tensor, Tensor]]


def accepted(kernel: Kernel, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``wanted`` that ``kernel`` names in its signature: versions differ, and some swallow what they do not
    know."""
    named = inspect.signature(kernel).parameters
    return {name: value for name, value in wanted.items() if name in named}


def call(
    kernel: Kernel,
    operands: Mapping[str, Tensor],
    state: Tensor | None,
    sequences: Sequences | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Run one of fla's kernels on our layout.

    Args:
        operands: what it takes, by its own names, among them ``v`` (B, T, H, N).
        state: (S, H, N, N) as ours, or None.
        sequences: of a packed row, B = 1; None for B sequences of T tokens.
        options: further arguments, left out where the installed version has none of that name.
    Returns: y (B, T, H, N) in the dtype of ``v``, and the states (S, H, N, N) as ours, fp32.
    """
    value = operands["v"]
    batch, tokens, heads, size = value.shape
    count = len(sequences.lengths) if sequences is not None else batch
    filled = [i for i in range(count) if (sequences.lengths[i] if sequences is not None else tokens)]
    whole = len(filled) == count
    start = None if state is None else state.float()
    if not filled:
        return value.clone(), value.new_zeros(count, heads, size, size, dtype=torch.float32) if start is None else start
    y, after = kernel(
        **operands,
        scale=1.0,
        initial_state=None if start is None else (start if whole else start[filled]).mT.contiguous(),
        output_final_state=True,
        **accepted(kernel, options),
        **_offsets(kernel, sequences, value.device),
    )
    after = after.float().mT
    if whole:
        return y, after
    rest = value.new_zeros(count, heads, size, size, dtype=torch.float32) if start is None else start
    return y, rest.index_copy(0, torch.tensor(filled, device=value.device), after)


def _offsets(kernel: Kernel, sequences: Sequences | None, device: torch.device) -> dict[str, Tensor]:
    if sequences is None:
        return {}
    # an empty sequence would shift the numbers of those behind it
    offsets = torch.tensor(sorted(set(sequences.offsets)), dtype=torch.int64)
    # with the host's copy no kernel waits for the device's
    return {"cu_seqlens": offsets.to(device, non_blocking=True), **accepted(kernel, {"cu_seqlens_cpu": offsets})}
