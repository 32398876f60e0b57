"""``python -m rwkvpeft.plan ...flags of train.py...``: what a run would train, need and take, without starting it.

No weight is read: a checkpoint's header tells its sizes. Without a checkpoint they are given by --my_testing,
--n_layer, --n_embd and --vocab_size. Any --devices, --num_nodes and --strategy can be planned for. Further flags:
--gpu_memory GB plans for GPUs with so much memory each, otherwise it is this machine; --tflops X says how many 1e12
operations a second one of them does, for the time of a step. With --debug every program for the WKV recurrence is
listed, with its time or why it cannot run here.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rwkvpeft.cli.guard import guarded
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.errors import UserError

if TYPE_CHECKING:
    from rwkvpeft.checkpoints.quantised import Quantisation
    from rwkvpeft.memory import Expected, Work
    from rwkvpeft.models.shape import ModelShape
    from rwkvpeft.training.module import RunPlan

_TERMS = {
    "frozen": "frozen weights",
    "trained": "trained weights, fp32",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations, temporaries",
    "strategy": "copies, buckets, gathered",
    "saving": "gathered to be written",
}
_NOT_ALWAYS = ("strategy", "saving")


@dataclass(frozen=True)
class Target:
    """The machine planned for: its kind of device, the bytes one has, whether it is this one, and what a user says it
    does, in 1e12 operations a second."""

    device_type: str
    available: int | None
    is_here: bool
    tflops: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 whether or not the run fits, 2 after a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _plan(words), debug="--debug" in words)


def _plan(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--gpu_memory")
    own.add_argument("--tflops")
    flags, rest = own.parse_known_args(words)
    given = parse_train(rest)
    # the seed plays no part, and a new one would be announced
    given.setdefault("random_seed", 0)
    memory = _above_zero("--gpu_memory", flags.gpu_memory, "gigabytes, as --gpu_memory 24")
    tflops = _above_zero("--tflops", flags.tflops, "1e12 operations a second, as --tflops 100")
    machine = _machine(given, memory)
    config, remarks = resolve(given, machine, planned=True)
    target = Target(machine.device_type, _available(config, machine, memory), memory is None, tflops)
    shape, packed = _sizes(config)
    for line in [*remarks, *_lines(shape, packed, config, target)]:
        print(line)
    if config.runtime.debug and memory is None:
        from rwkvpeft.cli.assemble import choose_programs

        chosen, more = choose_programs(shape, config)
        print("\n".join([f"operator: {chosen.wkv.report}", f"rest of a block: {chosen.rest}", *more]))
    return 0


def _above_zero(flag: str, text: str | None, expected: str) -> float | None:
    if text is None:
        return None
    try:
        size = float(text)
    except ValueError:
        size = 0
    if not 0 < size < math.inf:
        raise UserError(f"{flag} cannot be used", found=text, expected=expected)
    return size


def _machine(given: dict[str, Any], memory: float | None) -> Machine:
    from rwkvpeft.cli.assemble import find_machine

    if memory is not None:
        given.setdefault("accelerator", "gpu")
        return Machine("cuda", has_bf16=True)
    return find_machine(given.get("accelerator", "auto"))


def _available(config: TrainConfig, machine: Machine, gigabytes: float | None) -> int | None:
    """Bytes of each device."""
    from rwkvpeft.memory import memory_of_each

    return memory_of_each(machine.device_type, config.runtime) if gigabytes is None else int(gigabytes * 1e9)


def _sizes(config: TrainConfig) -> tuple[ModelShape, Quantisation]:
    """Of the checkpoint, or as typed.

    Raises: UserError if neither tells them.
    """
    from rwkvpeft.cli.scratch import planned_shape

    return planned_shape(config)


def _lines(shape: ModelShape, packed: Quantisation, config: TrainConfig, target: Target) -> list[str]:
    from rwkvpeft.checkpoints.quantised import quantisation_in_run
    from rwkvpeft.cli.assemble import likely_programs, make_adapter
    from rwkvpeft.config.splitting_batches import split_batches
    from rwkvpeft.memory import (
        choose_level,
        choose_parts,
        count_parameters,
        counts_of,
        expect,
        expect_levels,
        least_need,
        with_level,
        work_of_step,
    )

    method, adapter = config.method, partial(make_adapter, config.method)
    programs = likely_programs(shape, config, target.device_type)
    free, kind = target.available, target.device_type

    def need_of(asked: TrainConfig) -> Expected:
        return expect(shape, asked, adapter, packed, programs)

    def need_with(asked: TrainConfig) -> int:
        return expect(shape, asked, partial(make_adapter, asked.method), packed, programs).total

    parts = choose_parts(config, need_of, free=free, device_type=kind)
    whole, config = config, split_batches(config, parts.parts)
    levels = expect_levels(shape, config, adapter, packed, programs)
    recompute = choose_level(levels, config, free=free, device_type=kind)
    config = with_level(config, recompute.grad_cp)
    need = levels[recompute.grad_cp]
    least = least_need(shape, config, adapter, packed)
    total, trained = count_parameters(shape), counts_of(shape, config, adapter, packed).trained
    quant = quantisation_in_run(method, packed).quant
    source = f"{config.model.load_model}, " if config.model.load_model else ""
    return [
        f"model: {source}RWKV {shape.version}, {shape.n_layer} layers, width {shape.n_embd}, {total / 1e6:,.1f} M "
        "parameters",
        f"method: {_method(config)}, {trained / 1e6:,.2f} M trained ({100 * trained / total:.1f} %)"
        + (f", base in {quant}" if quant != "none" else ""),
        *_run_lines(shape, whole, target, work_of_step(shape, config, adapter, packed, programs)),
        *([parts.report] if parts.report else []),
        f"computed twice: {recompute.report}",
        f"memory on {_each_device(config)}, {config.runtime.precision}, at the worst moment of a step:",
        *(f"  {term:26}{_gb(getattr(need, name)):>9}" for name, term in _TERMS.items()
          if name not in _NOT_ALWAYS or getattr(need, name)),
        *_verdict(need, least.total, config, target, need_with),
        "in all with --grad_cp " + ", ".join(f"{name} {_gb(level.total)}" for name, level in levels.items()),
    ]


def _each_device(config: TrainConfig) -> str:
    from rwkvpeft.memory import devices_of

    devices = devices_of(config.runtime)
    return "the device" if devices == 1 else f"each of {devices} devices, --strategy {config.runtime.strategy}"


def _method(config: TrainConfig) -> str:
    if config.method.layer_profile:
        return f"layer profile {config.method.layer_profile}"
    return "every weight" if config.method.peft == "none" else config.method.peft


def _verdict(
    need: Expected, least: int, config: TrainConfig, target: Target, need_of: Callable[[TrainConfig], int]
) -> list[str]:
    from rwkvpeft.memory import OVERHEAD_BYTES, cheapest_ways

    expected, available = need.total, target.available
    overhead = OVERHEAD_BYTES.get(target.device_type, 0)
    what = "CUDA context" if target.device_type == "cuda" else "interpreter and libraries"
    lines = [f"  {'in all':26}{_gb(expected):>9}, and about {_gb(overhead)} of {what}"]
    if need.main_memory:
        here = config.runtime.devices
        lines.append(f"  {'main memory':26}{_gb(need.main_memory * here):>9} on each machine, for its {here} devices")
    if need.main_saving:
        lines.append(f"  {'main memory, saving':26}{_gb(need.main_saving):>9} more on the first machine")
    if available is None:
        return [*lines, "this machine: how much memory it has cannot be told"]
    there = f"of {_gb(available)} there"
    if expected + overhead <= available:
        return [*lines, f"it fits: {_gb(available - expected - overhead)} {there} are left"]
    weights_first = expected - need.activations > available
    ways = ", or ".join(cheapest_ways(config, need_of, weights_first=weights_first)) or "a smaller model"
    certain = "cannot fit" if least > available else "is not expected to fit"
    return [*lines, f"it {certain}: {_gb(expected + overhead - available)} {there} are missing; try {ways}"]


def _run_lines(shape: ModelShape, config: TrainConfig, target: Target, work: Work) -> list[str]:
    """How long a run is in steps and in time; batches are not cut into parts here."""
    import torch

    from rwkvpeft.cli.plan_time import time_lines
    from rwkvpeft.memory import devices_of
    from rwkvpeft.training.plan import run_plan

    schedule, length = config.schedule, config.data.ctx_len or 1
    devices = devices_of(config.runtime)
    batches = _batches(shape, config, devices)
    run = None if batches is None else run_plan(config, batches)
    step_tokens = schedule.micro_bsz * schedule.accumulate_grad_batches * devices * length
    here = torch.device(target.device_type) if target.is_here else None
    steps = None if run is None else run.total_steps
    time = time_lines(config, work, steps=steps, step_tokens=step_tokens, here=here, tflops=target.tflops)
    if run is None:
        return ["run: one pass over the data in each mini-epoch: --data_file tells how long", *time]
    return [_run_line(config, run, devices), *time]


def _run_line(config: TrainConfig, run: RunPlan, devices: int) -> str:
    schedule = config.schedule
    tokens = run.total_batches * schedule.micro_bsz * devices * (config.data.ctx_len or 1)
    most = "at most " if config.rows_vary else ""
    return (
        f"run: {run.epoch_count} x {run.epoch_steps:,} batches of {schedule.micro_bsz} rows of {most}"
        f"{config.data.ctx_len:,} tokens, {run.total_steps:,} steps, {most}{tokens:,} tokens{_chunks(config)}"
    )


def _chunks(config: TrainConfig) -> str:
    long = config.long_context
    return f", in chunks of {long.chunk_ctx:,} with {long.infctx_grad} gradients" if long.infctx else ""


def _batches(shape: ModelShape, config: TrainConfig, devices: int) -> int | None:
    """Of one device in a mini-epoch; None if only data that are not there could tell."""
    if config.schedule.epoch_steps or not config.data.data_file:
        return config.schedule.epoch_steps or None
    from rwkvpeft.cli.watch import open_training_data
    from rwkvpeft.data.datamodule import TrainingData

    dataset, _ = open_training_data(config, shape.vocab_size)
    repeats = config.rewards.policy_steps
    data = TrainingData(dataset, schedule=config.schedule, data=config.data, seed=0, repeats=repeats)
    return data.steps_for(devices)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
