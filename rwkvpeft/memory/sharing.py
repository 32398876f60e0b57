"""What each of several devices holds of a run, by ``--strategy``.

Letters: T trained numbers, D devices that train together.
Source: for DeepSpeed, ``runtime/zero/stage_1_and_2.py`` and ``stage3.py`` of version 0.19.
"""

from __future__ import annotations

from typing import NamedTuple

from rwkvpeft.config.groups import RuntimeConfig, TrainConfig
from rwkvpeft.memory.dry_run import Moment
from rwkvpeft.memory.outline import Counts

_FP32 = 4
# blocks whose weights are whole at once: the one at work, and the next one, which is fetched meanwhile
_GATHERED = 2


class Shares(NamedTuple):
    """Of what a device holds one of D parts only, and what the strategy needs of its own.

    ``optimizer``, ``gradients``, ``weights``: split or not. ``copies``: weights that are trained have a second fp32
    copy, split as the optimizer is. ``buckets``: gradients travel through a buffer. ``room``: all gradients have their
    place from the first step on. ``offload``: optimizer and copies are in main memory.
    """

    optimizer: bool = False
    gradients: bool = False
    weights: bool = False
    copies: bool = False
    buckets: bool = False
    room: bool = False
    offload: bool = False


_DDP = Shares(room=True)
_STAGE_1 = Shares(optimizer=True, copies=True, buckets=True)
_STAGE_2 = _STAGE_1._replace(gradients=True)
_STAGE_3 = _STAGE_2._replace(weights=True)

SHARES = {
    "auto": Shares(),
    "ddp": _DDP,
    "fsdp": Shares(optimizer=True, gradients=True, weights=True),
    "deepspeed_stage_1": _STAGE_1,
    "deepspeed_stage_1_offload": _STAGE_1._replace(offload=True),
    "deepspeed_stage_2": _STAGE_2,
    "deepspeed_stage_2_offload": _STAGE_2._replace(offload=True),
    "deepspeed_stage_3": _STAGE_3,
    "deepspeed_stage_3_offload": _STAGE_3._replace(offload=True),
}


def devices_of(runtime: RuntimeConfig) -> int:
    """Devices that train together, on all machines."""
    return runtime.devices * runtime.num_nodes


def shares_of(runtime: RuntimeConfig) -> Shares:
    """What ``--strategy`` does with so many devices; auto is DDP on several."""
    if runtime.strategy == "auto" and devices_of(runtime) > 1:
        return _DDP
    return SHARES.get(runtime.strategy, _DDP)


class Held(NamedTuple):
    """Bytes that a device holds throughout a run; ``main_memory`` is beside it, for this device's process."""

    frozen: int
    trained: int
    optimizer: int
    copies: int
    main_memory: int


def held(counts: Counts, moment_bytes: int, runtime: RuntimeConfig) -> Held:
    """What is there between two steps.

    Args:
        moment_bytes: of the optimizer, for each trained number.
    """
    shares, trained = shares_of(runtime), counts.trained
    share = _part(trained, runtime)
    # parts of quantised weights are no parameters, and no strategy splits them
    plain = counts.frozen_bytes - counts.packed_bytes
    optimizer = moment_bytes * (share if shares.optimizer else trained)
    copies = _FP32 * share if shares.copies else 0
    main_memory = 0
    if shares.offload:
        # with the gradients that the step is taken with, and what waits to be copied back
        main_memory = optimizer + copies + 2 * _FP32 * share
        optimizer = copies = 0
    return Held(
        frozen=counts.packed_bytes + (_part(plain, runtime) if shares.weights else plain),
        trained=_FP32 * (share if shares.weights else trained),
        optimizer=optimizer,
        copies=copies,
        main_memory=main_memory,
    )


def gradients_at(moment: Moment, phase: str, counts: Counts, runtime: RuntimeConfig) -> int:
    """Bytes of gradients on a device when a single one alone would have those of ``moment``."""
    shares, share = shares_of(runtime), _FP32 * _part(counts.trained, runtime)
    if shares.room:
        return _FP32 * counts.trained
    if shares.gradients or (shares.optimizer and phase == STEP):
        return 0 if shares.offload else share
    return moment.gradients


def beside(phase: str, counts: Counts, runtime: RuntimeConfig) -> int:
    """Bytes of what the strategy works with in a phase, beside ``held`` and the gradients."""
    shares = shares_of(runtime)
    share = _FP32 * _part(counts.trained, runtime)
    taken = 0
    if shares.buckets:
        bucket = _FP32 * min(runtime.ds_bucket_mb * 10**6, counts.trained)
        # on a GPU one is filled while another travels; stage 3 copies what it scatters
        bucket *= 2 if runtime.accelerator != "cpu" or shares.weights else 1
        # the gradients of a step are made flat
        taken += share if phase == STEP and not shares.offload else 0
        taken += bucket if shares.weights or phase not in (STEP, "forward") else 0
    if shares.weights and phase != STEP:
        taken += _gathered(counts, shares, runtime)
    return taken


def _gathered(counts: Counts, shares: Shares, runtime: RuntimeConfig) -> int:
    at_work = _GATHERED * counts.block_bytes + counts.ends_bytes
    if not shares.buckets:
        return at_work
    everything = counts.frozen_bytes - counts.packed_bytes + _FP32 * counts.trained
    # so many numbers stay gathered, because they are soon wanted again (``deepspeed_settings``)
    most = runtime.ds_bucket_mb * 10**6
    left = everything * most // max(counts.numbers, most)
    return min(everything, max(at_work, left))


def saving(counts: Counts, moment_bytes: int, config: TrainConfig) -> int:
    """Bytes of main memory in which the first process puts together what it writes: trained weights and moments.

    What lies whole in main memory is written from where it is, unless training goes on meanwhile.
    """
    in_place = config.runtime.accelerator == "cpu" and not shares_of(config.runtime).optimizer
    return 0 if in_place and not config.output.save_async else (_FP32 + moment_bytes) * counts.trained


STEP = "step"
"""The phase in which the optimizer takes its step."""


def _part(size: int, runtime: RuntimeConfig) -> int:
    return -(-size // devices_of(runtime))
