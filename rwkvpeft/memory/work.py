"""How much a training step computes and moves, counted on tensors without data, and how fast a device does either."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rwkvpeft.checkpoints.quantised import Quantisation
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.memory.expected import dry_step, tokens_of_step
from rwkvpeft.memory.outline import (
    FEW,
    PLAIN_PROGRAMS,
    UNPACKED,
    MakeAdapter,
    Programs,
    continued,
    counts_of,
    layers_are_alike,
    training_outline,
)
from rwkvpeft.memory.sharing import devices_of, shares_of
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.ops.opaque import BODIES

_SECONDS = 0.25
# an optimizer reads a gradient, and reads and writes a number and its two moments
_PASSES_OF_A_STEP = 7


class Work(NamedTuple):
    """``flops``: of all matrix products, 2 for each multiplication; ``moved``: bytes that everything else reads and
    writes."""

    flops: int
    moved: int


class Speed(NamedTuple):
    """What a device was seen to do in a second: ``flops`` of a large matrix product, ``moved`` bytes of a copy."""

    flops: float
    moved: float


def work_of_step(
    shape: ModelShape,
    config: TrainConfig,
    make_adapter: MakeAdapter,
    packed: Quantisation = UNPACKED,
    programs: Programs = PLAIN_PROGRAMS,
) -> Work:
    """What one device does in an optimizer step: all its micro-batches forward, backward, and what is computed twice.

    The step is the real one, so that frozen weights need no gradients here either. Programs that PyTorch cannot look
    into count by what they read and write. Rows are taken to be ``ctx_len`` long. Arguments as ``expect``.
    Raises: UserError if the settings do not suit the sizes; NoOutline.
    """

    def counted(layers: int) -> Work:
        part = replace(shape, n_layer=layers)
        counting = Counting()
        dry_step(training_outline(part, config, make_adapter(part), packed, programs), config, counting)
        return Work(counting.flops, counting.moved)

    if not layers_are_alike(config) or shape.n_layer <= FEW + 1:
        batch = counted(shape.n_layer)
    else:
        batch = Work(*continued(counted(FEW), counted(FEW + 1), shape.n_layer - FEW))
    times = config.schedule.accumulate_grad_batches * (config.data.ctx_len or 1) / tokens_of_step(config)
    trained = counts_of(shape, config, make_adapter, packed).trained
    parts = devices_of(config.runtime) if shares_of(config.runtime).optimizer else 1
    optimizer = 4 * _PASSES_OF_A_STEP * trained // parts
    return Work(round(batch.flops * times), round(batch.moved * times) + optimizer)


class Counting(TorchDispatchMode):
    """Counts the ``flops`` of matrix products and the bytes ``moved`` by all other operators while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        flops_of = flop_registry.get(func._overloadpacket)
        if flops_of is not None:
            self.flops += flops_of(*args, **kwargs, out_val=made)
        elif not _only_views(func, args, made):
            self.moved += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor))
        return made


def _only_views(func: Any, args: Any, made: Any) -> bool:
    """Whether an operator makes nothing but another look at what it takes, or room that is not yet filled."""
    if func in BODIES:
        return False
    if "empty" in func._schema.name:
        return True
    return any(
        isinstance(leaf, Tensor) and leaf is not arg and leaf.untyped_storage()._cdata == arg.untyped_storage()._cdata
        for leaf in tree_leaves(made)
        for arg in tree_leaves(args)
        if isinstance(arg, Tensor)
    )


def measured_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Time matrix products and copies on the device, for about half a second."""
    on_gpu = device.type == "cuda"
    size = 4096 if on_gpu else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(2**28 if on_gpu else 2**25, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Speed(
        flops=2 * size**3 * _per_second(lambda: a @ b, device),
        moved=2 * source.nbytes * _per_second(lambda: target.copy_(source), device),
    )


def _per_second(run: Callable[[], object], device: torch.device) -> float:
    """How often a second it runs, after a first time that does not count."""

    def finished(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    finished(1)
    times = max(1, int(_SECONDS / max(finished(1), 1e-6)))
    return times / finished(times)
