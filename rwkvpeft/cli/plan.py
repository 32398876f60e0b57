"""``python -m rwkvpeft.plan ...flags of train.py...``: what a run would train, need and take, without starting it.

No weight is read: a checkpoint's header tells its sizes. Without a checkpoint they are given by --my_testing,
--n_layer, --n_embd and --vocab_size. Further flag: --gpu_memory GB plans for a GPU with so much memory; otherwise it is
this machine. With --debug every program for the WKV recurrence is listed, with its time or why it cannot run here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvpeft.cli.guard import guarded
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.errors import UserError

if TYPE_CHECKING:
    from rwkvpeft.checkpoints.quantised import Quantisation
    from rwkvpeft.models.shape import ModelShape

_STEPS_LOOKED_AT = 50
_TERMS = {
    "frozen": "frozen weights",
    "trained": "trained weights, fp32",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations, temporaries",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 whether or not the run fits, 2 after a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _plan(words), debug="--debug" in words)


def _plan(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--gpu_memory")
    flags, rest = own.parse_known_args(words)
    given = parse_train(rest)
    # the seed plays no part, and a new one would be announced
    given.setdefault("random_seed", 0)
    memory = _gigabytes(flags.gpu_memory)
    machine, available = _machine(given, memory)
    config, remarks = resolve(given, machine, planned=True)
    shape, packed = _sizes(config)
    for line in [*remarks, *_lines(shape, packed, config, machine.device_type, available)]:
        print(line)
    if config.runtime.debug and memory is None:
        from rwkvpeft.cli.assemble import choose_programs

        chosen, more = choose_programs(shape, config)
        print("\n".join([f"operator: {chosen.wkv.report}", f"rest of a block: {chosen.rest}", *more]))
    return 0


def _gigabytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = float(text)
    except ValueError:
        size = 0
    if not size > 0:
        raise UserError("--gpu_memory cannot be used", found=text, expected="gigabytes, as --gpu_memory 24")
    return int(size * 1e9)


def _machine(given: dict[str, Any], memory: int | None) -> tuple[Machine, int | None]:
    """The machine planned for, and the bytes its device has."""
    from rwkvpeft.cli.assemble import find_machine
    from rwkvpeft.memory import total_memory

    if memory is not None:
        given.setdefault("accelerator", "gpu")
        return Machine("cuda", has_bf16=True), memory
    machine = find_machine(given.get("accelerator", "auto"))
    return machine, total_memory(machine.device_type)


def _sizes(config: TrainConfig) -> tuple[ModelShape, Quantisation]:
    """Of the checkpoint, or as typed.

    Raises: UserError if neither tells them.
    """
    from rwkvpeft.cli.scratch import planned_shape

    return planned_shape(config)


def _lines(
    shape: ModelShape, packed: Quantisation, config: TrainConfig, device_type: str, available: int | None
) -> list[str]:
    from rwkvpeft.checkpoints.quantised import quantisation_in_run
    from rwkvpeft.cli.assemble import likely_programs, make_adapter
    from rwkvpeft.memory import choose_level, count_parameters, expect_levels, least_need, with_level

    method = config.method
    programs = likely_programs(shape, config, device_type)
    levels = expect_levels(shape, config, partial(make_adapter, method), packed, programs)
    recompute = choose_level(levels, config, free=available, device_type=device_type)
    config = with_level(config, recompute.grad_cp)
    need = levels[recompute.grad_cp]
    least = least_need(shape, config, partial(make_adapter, method), packed)
    total, trained = count_parameters(shape), need.trained // 4
    quant = quantisation_in_run(method, packed).quant
    source = f"{config.model.load_model}, " if config.model.load_model else ""
    return [
        f"model: {source}RWKV {shape.version}, {shape.n_layer} layers, width {shape.n_embd}, {total / 1e6:,.1f} M "
        "parameters",
        f"method: {_method(config)}, {trained / 1e6:,.2f} M trained ({100 * trained / total:.1f} %)"
        + (f", base in {quant}" if quant != "none" else ""),
        *_run_lines(shape, config),
        f"computed twice: {recompute.report}",
        f"memory on the device, {config.runtime.precision}, at the worst moment of a step:",
        *(f"  {_TERMS[name]:26}{_gb(size):>9}" for name, size in need._asdict().items()),
        *_verdict(need.total, least.total, config, device_type, available),
        "in all with --grad_cp " + ", ".join(f"{name} {_gb(level.total)}" for name, level in levels.items()),
    ]


def _method(config: TrainConfig) -> str:
    if config.method.layer_profile:
        return f"layer profile {config.method.layer_profile}"
    return "every weight" if config.method.peft == "none" else config.method.peft


def _verdict(
    expected: int, least: int, config: TrainConfig, device_type: str, available: int | None
) -> list[str]:
    from rwkvpeft.memory import OVERHEAD_BYTES, ways_out

    overhead = OVERHEAD_BYTES.get(device_type, 0)
    what = "CUDA context" if device_type == "cuda" else "interpreter and libraries"
    lines = [f"  {'in all':26}{_gb(expected):>9}, and about {_gb(overhead)} of {what}"]
    if available is None:
        return [*lines, "this machine: how much memory it has cannot be told"]
    here = f"of {_gb(available)} there"
    if expected + overhead <= available:
        return [*lines, f"it fits: {_gb(available - expected - overhead)} {here} are left"]
    ways = ", or ".join(ways_out(config)) or "a smaller model"
    certain = "cannot fit" if least > available else "is not expected to fit"
    return [*lines, f"it {certain}: {_gb(expected + overhead - available)} {here} are missing; try {ways}"]


def _run_lines(shape: ModelShape, config: TrainConfig) -> list[str]:
    schedule = config.schedule
    devices = config.runtime.devices * config.runtime.num_nodes
    batches = _batches(shape, config, devices)
    if batches is None:
        return ["run: one pass over the data in each mini-epoch: --data_file tells how long", _speed_line(config, None)]
    from rwkvpeft.training.fit import run_plan

    run = run_plan(config, batches)
    tokens = run.total_batches * schedule.micro_bsz * devices * (config.data.ctx_len or 1)
    most = "at most " if config.data.rows_vary else ""
    return [
        f"run: {run.epoch_count} x {batches:,} batches of {schedule.micro_bsz} rows of {most}"
        f"{config.data.ctx_len:,} tokens, {run.total_steps:,} steps, {most}{tokens:,} tokens{_chunks(config)}",
        _speed_line(config, tokens),
    ]


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
    return TrainingData(dataset, schedule=config.schedule, data=config.data, seed=0).steps_for(devices)


def _speed_line(config: TrainConfig, tokens: int | None) -> str:
    """What an earlier run in the same folder was seen to do; nothing is guessed."""
    path = Path(config.output.proj_dir) / "loss_data.jsonl"
    speed = _measured_speed(path)
    if speed is None:
        return "speed: unknown until the first step"
    line = f"speed: {speed:,.0f} tokens/s, as in the last steps in {path}"
    return line if tokens is None else f"{line}; {_duration(tokens / speed)} for this run at that speed"


def _measured_speed(path: Path) -> float | None:
    if not path.is_file():
        return None
    try:
        steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[-_STEPS_LOOKED_AT:]]
        seconds = sum(float(step["t_cost"]) for step in steps)
        return sum(int(step["tokens"]) for step in steps) / seconds if seconds > 0 else None
    except (ValueError, KeyError, TypeError):
        # cut short by a kill, or another program's
        return None


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
