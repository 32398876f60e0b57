"""Predicted peak memory beside that of real runs of train.py on a CPU, each in processes of its own.

    python benchmarks/memory_cpu.py                            the six cases, a minute each
    python benchmarks/memory_cpu.py --cases lora --ctx_len 512
    python benchmarks/memory_cpu.py --strategies               full training on two processes, strategy by strategy

What is measured: the largest ``RssAnon`` (Linux) of a training process, read every two milliseconds, less that of the
same command on a model and rows too small to matter, whose interpreter, libraries and data are all the rest. glibc is
told to give every large block back when it is freed (MALLOC_MMAP_THRESHOLD_), so that what the process holds is what
the tensors hold. The prediction is the one of ``python -m rwkvpeft.plan``, tensors alone; with ``--grad_cp auto`` and
``--micro_bsz auto`` it decides. The time is that of a step, without the first, beside what the plan estimates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import print_table, write_json

from rwkvpeft.cli.assemble import make_adapter
from rwkvpeft.cli.guard import guarded
from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.memory import expect, measured_speed, work_of_step
from rwkvpeft.models.shape import ModelShape, new_shape
from rwkvpeft.registry import MODELS, find

ROOT = Path(__file__).resolve().parents[1]


class Case(NamedTuple):
    """A model and the flags it is trained with."""

    version: str
    layers: int
    width: int
    flags: str


CASES = {
    "full": Case("x070", 6, 512, "--peft none --micro_bsz 2"),
    "lora": Case("x070", 6, 512, "--peft lora --micro_bsz 2"),
    "state": Case("x060", 6, 512, "--peft state --micro_bsz 2"),
    "nf4 + lora": Case("x060", 12, 768, "--peft lora --quant nf4 --micro_bsz 1 --grad_cp selective"),
    "infctx": Case("x070", 6, 512, "--peft lora --micro_bsz 4 --infctx --chunk_ctx 64 --infctx_grad exact"),
    "grad_cp 1": Case("x060", 8, 512, "--peft none --micro_bsz 4 --grad_cp 1"),
}
STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_2_offload",
              "deepspeed_stage_3_offload", "fsdp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--strategies", nargs="*", choices=STRATEGIES, default=None)
    parser.add_argument("--ctx_len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--flags", default="", help="further flags of train.py for all")
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.cases}
    if options.strategies is not None:
        flags = "--peft none --micro_bsz 1 --devices 2 --strategy"
        bucket = {name: " --ds_bucket_mb 5" for name in STRATEGIES if name.startswith("deepspeed")}
        names = options.strategies or STRATEGIES
        cases = {name: Case("x070", 6, 512, f"{flags} {name}{bucket.get(name, '')}") for name in names}
    rows = []
    for name, case in cases.items():
        rows.append(measure(name, case, options))
        print(rows[-1], flush=True)
    print_table(rows)
    write_json(options.json, {"settings": vars(options), "rows": rows})


def measure(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    flags = [*case.flags.split(), *options.flags.split(), "--ctx_len", str(options.ctx_len)]
    shape = new_shape(case.version, n_layer=case.layers, n_embd=case.width, vocab_size=4096)
    little = new_shape(case.version, n_layer=2, n_embd=64, vocab_size=256)
    few = ["--ctx_len", "16", "--micro_bsz", "1"]
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "data", options.ctx_len)
        rest, _ = peak(little, [*flags, *few], Path(folder), options.steps)
        taken, seconds = peak(shape, flags, Path(folder), options.steps)
    predicted, estimate = prediction(shape, flags)
    measured = taken - rest + prediction(little, [*flags, *few])[0]
    return {
        "case": name,
        "process MB": taken / 1e6,
        "without MB": rest / 1e6,
        "measured MB": measured / 1e6,
        "predicted MB": predicted / 1e6,
        "predicted/measured": predicted / measured,
        "s a step": seconds,
        "estimated s": estimate,
    }


def write_tokens(prefix: Path, length: int) -> None:
    tokens = np.random.default_rng(0).integers(1, 256, (64, length + 1), dtype=np.uint16)
    write_binidx(prefix, iter(tokens))


def training_flags(model: str, flags: list[str], folder: Path) -> list[str]:
    given = {"--load_model": model, "--data_file": str(folder / "data"), "--proj_dir": str(folder / "out"),
             "--accelerator": "cpu", "--tokenizer": "bytes", "--random_seed": "1", "--resume": "none",
             "--report": "false", "--epoch_count": "1", "--epoch_save": "0"}
    return [*(word for pair in given.items() for word in pair), *flags]


def prediction(shape: ModelShape, flags: list[str]) -> tuple[int, float]:
    """Bytes, and seconds a step."""
    sizes = ["--my_testing", shape.version, "--n_layer", str(shape.n_layer), "--n_embd", str(shape.n_embd),
             "--vocab_size", str(shape.vocab_size), "--accelerator", "cpu", "--random_seed", "1"]
    config, _ = resolve(parse_train([*sizes, *flags]), Machine("cpu", has_bf16=True), planned=True)
    adapter = partial(make_adapter, config.method)
    work, speed = work_of_step(shape, config, adapter), measured_speed(torch.device("cpu"), torch.float32)
    return expect(shape, config, adapter).total, work.flops / speed.flops + work.moved / speed.moved


def peak(shape: ModelShape, flags: list[str], folder: Path, steps: int) -> tuple[int, float]:
    """Bytes of the largest training process, and seconds of its last step."""
    torch.manual_seed(0)
    model = folder / "model.pth"
    torch.save(find(MODELS, shape.version, flag="--my_testing").initial_weights(shape), model)
    words = [*training_flags(str(model), flags, folder), "--epoch_steps", str(steps)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, env=env, stdout=output,
                                   stderr=subprocess.STDOUT)
        watch = Watch(process.pid)
        watch.start()
        code = process.wait()
    watch.join()
    if code:
        raise SystemExit(log.read_text())
    records = [json.loads(line) for line in (folder / "out" / "loss_data.jsonl").read_text().splitlines()]
    return watch.most, min(record["t_cost"] for record in records[-steps:][1:])


class Watch(threading.Thread):
    """Reads the anonymous memory of a process and of those it started while it lives; ``most`` of any one."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.most = 0

    def run(self) -> None:
        children: list[int] = []
        for count in range(10**9):
            if count % 100 == 0:
                children = children_of(self.pid)
            sizes = [anonymous_bytes(pid) for pid in (self.pid, *children)]
            if sizes[0] == 0:
                return
            self.most = max(self.most, *sizes)
            time.sleep(0.002)


def children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def anonymous_bytes(pid: int) -> int:
    """0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    sys.exit(guarded(main))
