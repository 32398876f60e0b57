"""A block's fused operators and the loss head beside their twins in PyTorch: errors, times, bytes moved per second.

    python benchmarks/block.py                                  small, on a CPU: the twins alone
    python benchmarks/block.py --device cuda --json block.json  sizes of fine-tuning on a GPU, fused kernels and twins

A shape is BxTxHxN: batch, tokens, heads, head size. Times are the smallest of some rounds, in milliseconds. ``moved``
is the least that must be: inputs and results once forward, inputs, incoming and outgoing gradients once backward;
``of copy`` is the rate at which that much went by over the rate of a copy measured in the same run. Parameters are
frozen as in adapter training unless ``--train_parameters`` is given. Errors are relative Frobenius norms of the worst
result or gradient against fp64.

The loss head works on B·T rows of hidden states and a vocabulary of --vocab_size; its ``of copy`` is left out, since
products take most of its time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from measuring import copy_peak, fastest, machine, peak_bytes, print_table, relative_error, write_json
from torch import Tensor
from wkv import Shape, parse_shape

from rwkvpeft.cli.guard import guarded
from rwkvpeft.ops.bench import first_line
from rwkvpeft.ops.block.contract import BlockOps
from rwkvpeft.ops.block.trial import CALLS, Call, draw, results_of
from rwkvpeft.ops.cross_entropy import linear_cross_entropy
from rwkvpeft.registry import BLOCK_OPS, find

GPU_SHAPES = [(1, 1024, 12, 64), (1, 1024, 32, 64), (8, 1024, 32, 64), (8, 1024, 64, 64)]
CPU_SHAPES = [(1, 128, 4, 64)]
_PARAMETERS = "cpk"


def programs(names: list[str]) -> tuple[dict[str, BlockOps], dict[str, str]]:
    """Operators that can be imported, and why the others cannot."""
    found, absent = {}, {}
    for name in names:
        try:
            found[name] = find(BLOCK_OPS, name, flag="--programs")
        except Exception as reason:  # noqa: BLE001 a package may fail to be imported in any way
            absent[name] = first_line(reason)
    return found, absent


def inputs_of(call: Call, shape: Shape, options: argparse.Namespace) -> list[Tensor]:
    """Tensors of the run's size on the device."""
    batch, tokens, heads, size = shape
    drawn = draw(call.inputs, options.dtype, heads=heads, head_size=size, batch=batch, tokens=tokens)
    return [
        tensor.detach().to(options.device).requires_grad_(options.train_parameters or letter not in _PARAMETERS)
        for letter, tensor in zip(call.inputs, drawn, strict=True)
    ]


def moved_bytes(inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int]:
    """The least that goes through memory forward, and forward and backward together."""
    taken, given = sum(x.nbytes for x in inputs), sum(x.nbytes for x in outputs)
    grads = sum(x.nbytes for x in inputs if x.requires_grad)
    return taken + given, 2 * taken + 2 * given + grads


def measure(name: str, shape: Shape, ops: dict[str, BlockOps], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each program of one operator."""
    call = CALLS[name]
    inputs = inputs_of(call, shape, options)
    wanted = [x for x in inputs if x.requires_grad]
    small = (1, min(shape[1], 64), *shape[2:])
    exact = inputs_of(call, small, options)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in exact]
    truth = results_of(find(BLOCK_OPS, "torch", flag=""), call, wide)
    clocks: dict[str, Callable[[], object]] = {}
    rows = []
    for program, provider in ops.items():
        row: dict[str, Any] = {"operator": name, "shape": "x".join(map(str, shape)), "program": program}
        rows.append(row)
        try:
            found = results_of(provider, call, exact)
            row["error"] = max(relative_error(*pair) for pair in zip(found, truth, strict=True))
            outputs = [x for x in call.run(provider, *inputs) if x is not None]
            seeds = [torch.randn_like(x) for x in outputs]
            row["moved"] = moved_bytes(inputs, outputs)

            def forward(provider: BlockOps = provider) -> None:
                with torch.no_grad():
                    call.run(provider, *inputs)

            def both(provider: BlockOps = provider, seeds: list[Tensor] = seeds) -> None:
                results = [x for x in call.run(provider, *inputs) if x is not None]
                pairs = [(x, seed) for x, seed in zip(results, seeds, strict=True) if x.requires_grad]
                torch.autograd.grad([x for x, _ in pairs], wanted, [seed for _, seed in pairs], allow_unused=True)

            both()
            row["peak MiB"] = (peak_bytes(both, options.device) or 0) / 2**20
            clocks |= {f"{program} forward": forward, f"{program} both": both}
        except Exception as reason:  # noqa: BLE001 one that fails must not hide the others
            row |= {"failed": first_line(reason), "moved": None}
    times = fastest(clocks, options.device, options.rounds)
    return [_figures(row, times, options.bandwidth) for row in rows]


def _figures(row: dict[str, Any], times: dict[str, float], bandwidth: float) -> dict[str, Any]:
    forward, both = (times.get(f"{row['program']} {way}") for way in ("forward", "both"))
    moved = row.pop("moved") or (0, 0)
    timed = forward is not None and both is not None
    return {
        **{name: row.get(name) for name in ("operator", "shape", "program", "error")},
        "fwd ms": 1e3 * forward if timed else None,
        "fwd+bwd ms": 1e3 * both if timed else None,
        "moved MB": moved[1] / 1e6 if timed else None,
        "fwd of copy": moved[0] / forward / bandwidth if timed else None,
        "of copy": moved[1] / both / bandwidth if timed else None,
        "peak MiB": row.get("peak MiB"),
        "failed": row.get("failed"),
    }


def loss_head(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The chunked loss by each program for rows of logits, and the plain way: whole logits, PyTorch's cross entropy."""
    batch, tokens, heads, size = shape
    width = heads * size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, tokens, width, generator=generator).to(options.device, options.dtype).requires_grad_()
    head = (torch.randn(options.vocab_size, width, generator=generator) / width**0.5).to(options.device, options.dtype)
    labels = torch.randint(options.vocab_size, (batch, tokens), generator=generator).to(options.device)
    weights = torch.ones(batch, tokens, device=options.device)
    total = weights.sum()

    def ours(program: str, hidden: Tensor = hidden, head: Tensor = head) -> Tensor:
        return linear_cross_entropy(hidden, head, labels, weights, normaliser=total, logit_penalty=0.0,
                                    chunk_rows=512, rows=program)

    def plain(hidden: Tensor = hidden, head: Tensor = head) -> Tensor:
        return torch.nn.functional.cross_entropy((hidden @ head.mT).flatten(0, 1).float(), labels.flatten())

    ways: dict[str, Callable[..., Tensor]] = {"whole logits": plain, "torch": lambda **x: ours("torch", **x)}
    if "triton" in options.programs:
        ways["triton"] = lambda **x: ours("triton", **x)
    wide = hidden.detach()[:1, :64].double().requires_grad_()
    exact = plain_gradient(wide, head.double(), labels[:1, :64])
    clocks, rows = {}, []
    for name, way in ways.items():
        row: dict[str, Any] = {"operator": f"loss, vocabulary {options.vocab_size}",
                               "shape": "x".join(map(str, shape)), "program": name, "moved": None}
        rows.append(row)

        def both(way: Callable[..., Tensor] = way) -> Tensor:
            return torch.autograd.grad(way(), hidden)[0]

        try:
            scale = batch * tokens / min(tokens, 64)
            row["error"] = relative_error(both()[:1, :64] * scale, exact)
            row["peak MiB"] = (peak_bytes(both, options.device) or 0) / 2**20
            clocks |= {f"{name} forward": way, f"{name} both": both}
        except Exception as reason:  # noqa: BLE001 too little memory for whole logits must not hide the others
            row["failed"] = first_line(reason)
    times = fastest(clocks, options.device, options.rounds)
    figures = [_figures(row, times, options.bandwidth) for row in rows]
    return [row | {"moved MB": None, "fwd of copy": None, "of copy": None} for row in figures]


def plain_gradient(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Of the mean loss over these rows alone, in the dtype of its inputs."""
    loss = torch.nn.functional.cross_entropy((hidden @ head.mT).flatten(0, 1), labels.flatten())
    return torch.autograd.grad(loss, hidden)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="BxTxHxN")
    parser.add_argument("--operators", nargs="+", choices=[*CALLS, "loss"], default=[*CALLS, "loss"])
    parser.add_argument("--programs", nargs="+", choices=[*BLOCK_OPS], help="default: torch on a CPU, all on a GPU")
    parser.add_argument("--train_parameters", action="store_true")
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    on_gpu = options.device.type != "cpu"
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    options.programs = options.programs or ([*BLOCK_OPS] if on_gpu else ["torch"])
    options.bandwidth = copy_peak(options.device)
    ops, absent = programs(options.programs)
    record: dict[str, Any] = {"machine": machine(options.device), "bytes/s": options.bandwidth, "dtype":
                              str(options.dtype), "rows": [], "absent": absent}
    for shape in options.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES):
        rows: list[dict[str, Any]] = []
        for name in options.operators:
            try:
                rows += loss_head(shape, options) if name == "loss" else measure(name, shape, ops, options)
            except Exception as reason:  # noqa: BLE001 one operator that fails must not hide the others
                print(f"{name}: {first_line(reason)}", flush=True)
        record["rows"] += rows
        print_table(rows)
        write_json(options.json, record)


if __name__ == "__main__":
    sys.exit(guarded(main))
