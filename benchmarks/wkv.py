"""Accuracy and time of the WKV operators on every backend, with the machine's floors beside them.

    python benchmarks/wkv.py                                     small shapes on a CPU
    python benchmarks/wkv.py --device cuda --json wkv.json       the five shapes of fine-tuning on a GPU
    python benchmarks/wkv.py --device cuda --hard                inputs that break naive kernels, errors alone
    python benchmarks/wkv.py --versions 7 --device cuda --against mine.py:wkv7 --peer wind=../wind_rwkv

A shape is BxTxHxN: batch, tokens, heads, head size. Times are the smallest of some rounds, in milliseconds a layer, a
stream of calls on a GPU; backends take turns. ``floor`` is the larger of the arithmetic of one pass over chunks of 64
at the measured rate of a matrix product and its memory traffic at the measured rate of a copy; ``products`` are the
large matrix products of the layer the operator stands in. Errors are relative Frobenius norms against fp64, over at
most 4 heads of one row: of y and of the worst gradient, which is named.

``--against MODULE:FUNCTION`` times another implementation in the same run: a function with the keyword-only arguments
r, w, k, v, a, b (or r, w, k, v, u), all (B, T, H, N), w as our operators take it, and state=None, that returns y and
the final state or None. ``--peer NAME=PATH`` loads a known one from a checkout of its authors (see peers.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import peers
import torch
from measuring import (
    copy_peak,
    fastest,
    load_function,
    machine,
    peak_bytes,
    print_table,
    product_peak,
    relative_error,
    write_json,
)
from torch import Tensor
from wkv_cases import cases, errors, few_cases, results

from rwkvpeft.cli.guard import guarded
from rwkvpeft.ops.bench import first_line
from rwkvpeft.ops.contract import Backend, Needs, Wkv
from rwkvpeft.ops.sequences import taking_sequences
from rwkvpeft.ops.trial import sample_operands
from rwkvpeft.registry import BACKENDS, find

GPU_SHAPES = [(1, 512, 12, 64), (1, 1024, 32, 64), (1, 4096, 32, 64), (4, 4096, 32, 64), (8, 4096, 64, 64)]
CPU_SHAPES = [(1, 512, 12, 64)]
SQUARE = {"wkv5": 6, "wkv6": 6, "wkv7": 4}
"""C x C weights of a layer, beside the channel mixing's two of C x hidden."""
HIDDEN = {"wkv5": 3.5, "wkv6": 3.5, "wkv7": 4}
"""hidden / C."""
WORK = {"wkv5": (14, 12), "wkv6": (14, 12), "wkv7": (60, 26)}
"""Operations for each token and head, forward and backward over chunks of L: so many times L N, and N²."""
TRAFFIC = {"wkv5": 1664, "wkv6": 2048, "wkv7": 2816}
"""Bytes for each token and head of 64 channels: 16-bit operands, results and gradients, and states each 64 tokens."""
_CHECKED_HEADS = 4

Shape = tuple[int, int, int, int]


def floor_seconds(operator: str, shape: Shape, flops: float, bandwidth: float) -> float:
    """The least a forward and a backward over chunks of 64 tokens can take, states kept in 16 bits."""
    batch, tokens, heads, size = shape
    length = 64
    inside, across = WORK[operator]
    work = inside * length * size + across * size**2
    traffic = TRAFFIC[operator] * size / 64
    return batch * tokens * heads * max(work / flops, traffic / bandwidth)


def find_backends(operator: str, names: list[str]) -> tuple[dict[str, Backend], dict[str, str]]:
    """Backends that can be imported, and why the others cannot."""
    found, absent = {}, {}
    for name in names:
        if name not in BACKENDS[operator]:
            continue
        try:
            found[name] = find(BACKENDS[operator], name, flag="--backends")
        except Exception as reason:  # noqa: BLE001 a package may fail to be imported in any way
            absent[name] = first_line(reason)
    return found, absent


def layer_products(operator: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """The large products of one layer, forward and the backward of adapter training: no gradient of a weight."""
    batch, tokens, heads, size = shape
    width, hidden = heads * size, int(HIDDEN[operator] * heads * size)
    x, wide = (torch.randn(batch * tokens, n, device=device).to(dtype) for n in (width, hidden))
    square, up = (torch.randn(width, n, device=device).to(dtype) for n in (width, hidden))

    def run() -> None:
        for _ in range(2 * SQUARE[operator]):
            torch.mm(x, square)
        for _ in range(2):
            torch.mm(x, up)
            torch.mm(wide, up.mT)

    return run


def check(run: Wkv, operator: str, needs: Needs, device: torch.device) -> dict[str, float]:
    """Errors on the same decays and tokens, with few enough heads that fp64 takes no time."""
    few = replace(needs, batch=1, heads=min(needs.heads, _CHECKED_HEADS))
    operands = sample_operands(operator, few, device, seed=1)
    seed = torch.randn(operands["v"].shape, device=device, generator=torch.Generator(device).manual_seed(2))
    seed = seed.to(needs.dtype)
    truth: Backend = find(BACKENDS[operator], "torch", flag="")

    def all_of(run: Wkv, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        y, _ = run(**inputs, state=None)
        grads = torch.autograd.grad(y, list(inputs.values()), seed.to(y))
        return {"y": y} | dict(zip(inputs, grads, strict=True))

    exact = all_of(truth.run, {name: x.detach().double().requires_grad_() for name, x in operands.items()})
    found = all_of(run, operands)
    return {name: relative_error(found[name], x) for name, x in exact.items()}


def measure(operator: str, shape: Shape, runs: Mapping[str, Wkv], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each implementation; what fails says why in its row."""
    device, dtype = options.device, options.dtype
    batch, tokens, heads, size = shape
    needs = Needs(device.type, dtype, size, training=True, batch=batch, tokens=tokens, heads=heads)
    operands = sample_operands(operator, needs, device)
    seed = torch.randn_like(operands["v"])
    clocks: dict[str, Callable[[], object]] = {"products": layer_products(operator, shape, device, dtype)}
    seen: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        def forward(run: Wkv = run) -> None:
            with torch.no_grad():
                run(**operands, state=None)

        def both(run: Wkv = run) -> None:
            torch.autograd.grad(run(**operands, state=None)[0], list(operands.values()), seed)

        seen[name] = {"errors": None, "peak": None, "failed": None}
        try:
            seen[name]["errors"] = check(run, operator, needs, device)
            both()
            seen[name]["peak"] = peak_bytes(both, device)
        except Exception as reason:  # noqa: BLE001 one that fails must not hide the others
            seen[name]["failed"] = first_line(reason)
            continue
        clocks |= {f"{name} forward": forward, f"{name} both": both}
    times = fastest(clocks, device, options.rounds)
    floor = floor_seconds(operator, shape, *options.ceilings)
    rows = []
    for name, record in seen.items():
        worst = max(record["errors"] or {"": 0.0}, key=lambda n: (record["errors"] or {"": 0.0})[n] * (n != "y"))
        both_ms = 1e3 * times[f"{name} both"] if f"{name} both" in times else None
        rows.append({
            "operator": operator, "shape": "x".join(map(str, shape)), "backend": name,
            "fwd ms": 1e3 * times[f"{name} forward"] if both_ms is not None else None, "fwd+bwd ms": both_ms,
            "floor ms": 1e3 * floor, "products ms": 1e3 * times["products"],
            "peak MiB": record["peak"] / 2**20 if record["peak"] is not None else None,
            "y": record["errors"] and record["errors"]["y"], "worst": record["errors"] and record["errors"][worst],
            "of": record["failed"] or worst,
        })
    return rows


def hard(operator: str, backends: Mapping[str, Backend], device: torch.device, few: bool) -> list[dict[str, Any]]:
    """One row for each input and backend: its largest error over what that result excuses."""
    truth: Backend = find(BACKENDS[operator], "torch", flag="")
    exact = taking_sequences(operator, truth)
    rows = []
    for case in few_cases(operator, device) if few else cases(operator, device, large=device.type == "cuda"):
        expected = results(exact, case, torch.float64)
        for name, backend in backends.items():
            size, dtype = case.operands["v"].shape[-1], case.operands["v"].dtype
            objections = backend.supports.objections(Needs("cuda", dtype, size, training=True))
            if objections and name not in ("torch", "reference"):
                continue
            row: dict[str, Any] = {"operator": operator, "input": case.name, "backend": name}
            try:
                found, again = (results(taking_sequences(operator, backend), case) for _ in range(2))
            except Exception as reason:  # noqa: BLE001 one that fails must not hide the others
                rows.append(row | {"error": None, "allowed": None, "of": first_line(reason), "verdict": "FAILED"})
                continue
            wrong = errors(found, expected)
            worst = max(wrong, key=lambda name: wrong[name] / case.limit(name))
            same = all(torch.equal(x, again[key]) for key, x in found.items())
            verdict = "WRONG" if wrong[worst] > case.limit(worst) else "right" if same else "NOT THE SAME TWICE"
            rows.append(row | {"error": wrong[worst], "allowed": case.limit(worst), "of": worst, "verdict": verdict})
    return rows


def parse_shape(text: str) -> Shape:
    """``"1x512x12x64"`` as four integers."""
    parts = tuple(int(part) for part in text.split("x"))
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"a shape is BxTxHxN, found {text!r}")
    return parts


def main() -> None:
    names = list(dict.fromkeys(name for row in BACKENDS.values() for name in row))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["5", "6", "7"], choices=["5", "6", "7"])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="BxTxHxN")
    parser.add_argument("--backends", nargs="+", choices=names,
                        help="default: torch on a CPU, everything but the reference on a GPU")
    parser.add_argument("--against", nargs="+", default=[], metavar="MODULE:FUNCTION")
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME=PATH", help="wkv7 of others, see peers.py")
    parser.add_argument("--hard", action="store_true", help="errors on inputs that break naive kernels, no times")
    parser.add_argument("--few", action="store_true", help="with --hard: three small inputs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"],
                        help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = options.device.type != "cpu"
    wanted = options.backends or ([name for name in names if name != "reference"] if on_gpu else ["torch"])
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    record: dict[str, Any] = {"machine": machine(options.device), "dtype": str(options.dtype), "rows": [], "absent": {}}
    if not options.hard:
        options.ceilings = product_peak(options.device, options.dtype), copy_peak(options.device)
        record["ceilings"] = dict(zip(("FLOP/s", "bytes/s"), options.ceilings, strict=True))
    others = {"wkv7": dict(peers.load_peer(text) for text in options.peer)}
    for version in options.versions:
        operator = f"wkv{version}"
        backends, absent = find_backends(operator, wanted)
        record["absent"][operator] = absent
        if options.hard:
            rows = hard(operator, backends, options.device, options.few)
            record["rows"] += rows
            print_table(rows)
        else:
            runs = {name: backend.run for name, backend in backends.items()}
            runs |= {place: load_function(place) for place in options.against} | others.get(operator, {})
            for shape in options.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES):
                rows = measure(operator, shape, runs, options)
                record["rows"] += rows
                print_table(rows)
                write_json(options.json, record)
        for name, reason in absent.items():
            print(f"{operator} {name}: {reason}")
        write_json(options.json, record)


if __name__ == "__main__":
    sys.exit(guarded(main))
