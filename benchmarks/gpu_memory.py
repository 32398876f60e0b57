"""How much GPU memory training takes: RWKV-PEFT's table of RWKV-7 repeated, and 7.2B and 13.3B.

    python benchmarks/gpu_memory.py                             on an idle GPU: every case, each in a fresh process
    python benchmarks/gpu_memory.py --sizes 2.9B --quant nf4    some of them
    python benchmarks/gpu_memory.py --predict                   without a GPU: what rwkvpeft.memory expects
    python benchmarks/gpu_memory.py --device cpu --sizes tiny   does it run? The process's peak on a CPU

Settings as in RWKV-PEFT's README: bf16, ctx_len 1024, micro_bsz 1, r 64, checkpointing on; --train_parts time ln. (Its
DiSHA has r 32, ours 64.) Weights are random, of the real shapes, made on the device tensor by tensor and quantised as
they are made. Two optimizer steps go through the real model, adapter, objective and optimizer, without Lightning,
whose own objects lie in host memory.

"allocated" and "reserved" are PyTorch's peaks during the steps; "nvidia-smi" is what the driver says of the whole GPU
afterwards, CUDA context included, so nothing else may run on it. The ratio compares that figure (predicted: tensors and
about 0.5 GB of context) with the published one; both in GB of 10^9 bytes, which favours the published one if that was
meant in GiB. --results FILE keeps what was measured and skips it in the next call.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.cli.assemble import likely_programs
from rwkvpeft.cli.guard import guarded
from rwkvpeft.config.groups import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.memory import OVERHEAD_BYTES, expect
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import ModelShape, new_shape
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.ops.block.choose import choose_block_ops
from rwkvpeft.ops.choose import choose_backend
from rwkvpeft.ops.contract import Needs
from rwkvpeft.training.devices import place_model
from rwkvpeft.training.optimizers.contract import find_optimizer
from rwkvpeft.training.parameter_groups import parameter_groups

SIZES = {
    "tiny": (2, 128, 512),
    "0.1B": (12, 768, 65536),
    "0.4B": (24, 1024, 65536),
    "1.5B": (24, 2048, 65536),
    "2.9B": (32, 2560, 65536),
    "7.2B": (32, 4096, 65536),
    "13.3B": (61, 4096, 65536),
}
METHODS = ("state", "lora", "miss", "pissa")
BASES = ("none", "int8", "nf4")
# GB by size and base, in the order of METHODS; RWKV-PEFT's README, measured on an RTX 4090
PUBLISHED = {
    ("0.1B", "none"): (2.6, 2.7, 2.7, 2.6),
    ("0.4B", "none"): (3.1, 3.4, 3.1, 3.4),
    ("1.5B", "none"): (5.3, 5.6, 5.6, 5.6),
    ("2.9B", "none"): (8.2, 8.8, 8.8, 8.8),
    ("0.1B", "int8"): (2.4, 2.5, 2.5, 2.5),
    ("0.4B", "int8"): (2.9, 2.9, 2.9, 3.0),
    ("1.5B", "int8"): (4.1, 4.6, 4.5, 4.6),
    ("2.9B", "int8"): (5.7, 6.7, 6.7, 6.7),
    ("0.1B", "nf4"): (2.5, 2.4, 2.4, 2.4),
    ("0.4B", "nf4"): (2.8, 2.7, 2.7, 2.7),
    ("1.5B", "nf4"): (3.7, 3.9, 3.9, 3.9),
    ("2.9B", "nf4"): (4.7, 5.7, 5.7, 5.7),
}
AIM = 0.6
STEPS = 2


class RandomWeights(Mapping[str, Tensor]):
    """A checkpoint of random weights: each tensor is made when it is asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: str) -> None:
        self.shapes = shapes
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if ".ln" in name or name.startswith("ln_"):
            value = 1.0 if name.endswith("weight") else 0.0
            return torch.full(shape, value, dtype=torch.bfloat16, device=self.device)
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return tensor.normal_(std=0.5 / math.sqrt(shape[-1]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def settings_of(options: argparse.Namespace, method: str, quant: str) -> TrainConfig:
    settings = {} if method == "state" else {"r": options.rank}
    return TrainConfig(
        ModelConfig(),
        DataConfig(ctx_len=options.ctx_len),
        ScheduleConfig(micro_bsz=options.micro_bsz),
        OptimizerConfig(optim=options.optim),
        MethodConfig(
            peft=method,
            peft_config=settings,
            quant=quant,
            quant_double=options.quant_double and quant == "nf4",
            quant_head=options.quant_head and quant != "none",
        ),
        RuntimeConfig(
            precision="bf16", grad_cp=options.grad_cp, accelerator="cpu" if options.device == "cpu" else "gpu"
        ),
        OutputConfig(),
    )


def shape_of(size: str) -> ModelShape:
    n_layer, n_embd, vocab_size = SIZES[size]
    return new_shape("x070", n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size)


def adapter_of(method: MethodConfig):
    return build_adapter(method.peft, method.peft_config, [] if method.peft == "state" else method.train_parts)


def predict(options: argparse.Namespace, size: str, method: str, quant: str) -> dict[str, float]:
    config = settings_of(options, method, quant)
    shape = shape_of(size)
    device = "cpu" if options.device == "cpu" else "cuda"
    programs = likely_programs(shape, config, device)
    need = expect(shape, config, lambda part: adapter_of(config.method), programs=programs)
    return {"expected": need.total, "in all": need.total + OVERHEAD_BYTES[device]}


def make_model(options: argparse.Namespace, shape: ModelShape, config: TrainConfig):
    method = config.method
    needs = Needs(options.device, torch.bfloat16, shape.head_size, True, options.micro_bsz, options.ctx_len,
                  shape.n_head)
    wkv, block = choose_backend(operator_of(shape), options.op, needs), choose_block_ops("auto", needs)
    model = build_model(shape, wkv.run, block_ops=block.ops)
    weights = RandomWeights({name: tuple(p.shape) for name, p in model.named_parameters()}, options.device)
    adapter = adapter_of(method)
    quantiser = None
    if method.quant != "none":
        quantiser = Quantiser(
            method.quant, method.quant_double, method.quant_head, device=options.device, keep=adapter.trains
        )
    fill_model(
        model,
        weights,
        device=options.device,
        dtype=torch.bfloat16,
        source="random weights",
        quantiser=quantiser,
        prepare=adapter.prepare,
    )
    adapter.attach(model)
    place_model(model, "bf16", options.device)
    model.recompute = LEVELS[options.grad_cp]
    return model.train()


def train(options: argparse.Namespace, model, config: TrainConfig) -> float:
    """Two steps; returns the seconds of the last."""
    groups = parameter_groups(model.named_parameters(), layerwise_lr=True, weight_decay=0.0)
    optimizer = find_optimizer(options.optim).build(groups, config.optimizer, scaled_gradients=False)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    objective = LanguageModelling(config.optimizer.logit_penalty)
    rows = (options.micro_bsz, options.ctx_len + 1)
    seconds = 0.0
    for _ in range(STEPS):
        start = time.perf_counter()
        ids = torch.randint(1, model.shape.vocab_size, rows, device=options.device)
        weights = torch.ones(rows[0], rows[1] - 1, device=options.device)
        batch = TokenBatch(ids[:, :-1], ids[:, 1:], weights, weights.sum())
        loss = objective(model, batch).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()}: these figures would mean nothing")
        seconds = time.perf_counter() - start
    return seconds


def measure(options: argparse.Namespace, size: str, method: str, quant: str) -> dict[str, float]:
    """One case, in this process."""
    torch.manual_seed(0)
    config = settings_of(options, method, quant)
    if options.device == "cpu":
        model = make_model(options, shape_of(size), config)
        seconds = train(options, model, config)
        return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "seconds": seconds}
    model = make_model(options, shape_of(size), config)
    loading = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = train(options, model, config)
    torch.cuda.synchronize()
    return {
        "loading": loading,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "in all": driver_figure(),
        "seconds": seconds,
    }


def driver_figure() -> float:
    """What nvidia-smi says is used of the first GPU; where it cannot be called, what the CUDA runtime says."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        free, total = torch.cuda.mem_get_info()
        return total - free


def in_a_fresh_process(argv: list[str], case: tuple[str, str, str]) -> dict[str, float] | str:
    """The figures of a case, or the last line of what went wrong."""
    done = subprocess.run(
        [sys.executable, __file__, *argv, "--case", *case], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(case: tuple[str, str, str], figures: dict[str, float] | str, columns: tuple[str, ...]) -> str:
    size, quant, method = case
    base = "bf16" if quant == "none" else quant
    if isinstance(figures, str):
        return f"| {size} | {base} | {method} | {figures} |"
    published = PUBLISHED[size, quant][METHODS.index(method)] if (size, quant) in PUBLISHED else None
    cells = [f"{figures[column] / 1e9:.2f}" for column in columns]
    ratio = figures["in all"] / 1e9 / published if published and "in all" in figures else None
    cells += ["" if published is None else f"{published:.1f}"]
    cells += ["" if ratio is None else f"{ratio:.0%}" + (" above the aim" if ratio > AIM else "")]
    return f"| {size} | {base} | {method} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[size for size in SIZES if size != "tiny"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quant", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--predict", action="store_true", help="run nothing; print what rwkvpeft.memory expects")
    parser.add_argument("--results", type=Path, help="JSON file that keeps what was measured")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--micro_bsz", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--grad_cp", choices=LEVELS, default="1")
    parser.add_argument("--op", default="auto")
    parser.add_argument("--optim", default="adam")
    parser.add_argument("--quant_double", action="store_true", help="with nf4: quantised scales")
    parser.add_argument("--quant_head", action="store_true", help="with int8 and nf4: quantise the head too")
    parser.add_argument("--case", nargs=3, metavar=("SIZE", "QUANT", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        size, quant, method = options.case
        print(json.dumps(measure(options, size, method, quant)))
        return
    if options.device == "cuda" and not options.predict and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here: --predict prints what is expected of one")
    print_table(options, sys.argv[1:])


def print_table(options: argparse.Namespace, argv: list[str]) -> None:
    if options.predict:
        columns: tuple[str, ...] = ("expected", "in all")
        titles = ["expected tensors", "with context"]
    elif options.device == "cpu":
        columns, titles = ("process",), ["peak of the process"]
    else:
        columns, titles = ("allocated", "reserved", "in all"), ["allocated", "reserved", "nvidia-smi"]
    print(f"| size | base | method | {' | '.join(titles)} | RWKV-PEFT | ratio |")
    print("|---" * (len(titles) + 5) + "|")
    # what other settings measured must not be taken for this
    setting = f"{options.device} {options.ctx_len} {options.micro_bsz} {options.rank} {options.grad_cp} {options.op} "
    setting += f"{options.optim} {options.quant_double} {options.quant_head}"
    known = json.loads(options.results.read_text()) if options.results and options.results.is_file() else {}
    for size in options.sizes:
        for quant in options.quant:
            for method in options.methods:
                case = (size, quant, method)
                key = " ".join([*case, setting])
                if options.predict:
                    print(row(case, predict(options, size, method, quant), columns), flush=True)
                    continue
                if key not in known:
                    known[key] = in_a_fresh_process(argv, case)
                    if options.results and not isinstance(known[key], str):
                        done = {name: figures for name, figures in known.items() if not isinstance(figures, str)}
                        options.results.write_text(json.dumps(done, indent=1))
                print(row(case, known[key], columns), flush=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
