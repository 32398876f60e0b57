"""Measure the peak host memory of loading a model as it is and quantised, each in a process of its own.

    python benchmarks/load_memory.py --quant none,nf4

Writes a random v7 checkpoint in bf16, by default of the 1.5B model's shape (3.1 GB), and loads it once per format.
The peak is VmHWM of ``/proc/self/status`` (Linux): every page the process had at once, of the mapped file as well.
Times depend on the file being in the system's cache, which it is right after it was written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rwkvpeft.checkpoints.load import build_model, load_model
from rwkvpeft.checkpoints.quantised import Quantiser, quantise_file
from rwkvpeft.checkpoints.stream import Spec, write_tensors
from rwkvpeft.models.shape import ModelShape, new_shape
from rwkvpeft.quantization.format import build_format
from rwkvpeft.registry import FORMATS


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.load:
        print(json.dumps(load(options)))
        return
    shape = new_shape("x070", n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.pth"
        write_random(path, shape)
        file_gb = path.stat().st_size / 1e9
        print(f"{options.n_layer} layers of width {options.n_embd}, file {file_gb:.2f} GB, {options.threads} threads")
        print(f"{'--quant':<18} {'peak GB':>8} {'of file':>8} {'weights GB':>11} {'seconds':>8} {'quantised/s':>12}")
        for quant in options.quant.split(","):
            report(quant, run(path, quant, options), file_gb)
            if options.saved and quant != "none":
                saved = path.with_name("saved.pth")
                quantise_file(path, saved, Quantiser(quant))
                report(f"{quant}, saved so", run(saved, "none", options), file_gb)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", default="none,int8,nf4,fp4,fp8", help=f"of none, {', '.join(FORMATS)}")
    parser.add_argument("--saved", action="store_true", help="also load files that are quantised already")
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=2048)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where the model is written for the time being")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_random(path: Path, shape: ModelShape) -> None:
    """A checkpoint of that shape, written tensor by tensor."""
    model = build_model(shape, lambda **_: None)
    specs = {name: Spec(tuple(tensor.shape), torch.bfloat16) for name, tensor in model.named_parameters()}
    write_tensors(path, specs, lambda name: torch.empty(specs[name].shape, dtype=torch.bfloat16).normal_(std=0.02))


def run(path: Path, quant: str, options: argparse.Namespace) -> dict[str, float]:
    """Load in a fresh process."""
    words = [sys.executable, __file__, "--load", str(path), "--quant", quant, "--threads", str(options.threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def load(options: argparse.Namespace) -> dict[str, float]:
    quantiser = None if options.quant == "none" else Quantiser(options.quant)
    start = time.perf_counter()
    model = load_model(options.load, quantiser=quantiser)
    seconds = time.perf_counter() - start
    return {
        "peak": peak_bytes(),
        "seconds": seconds,
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "speed": quantise_speed(options.quant),
    }


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not tell the peak")


def quantise_speed(quant: str) -> float:
    """Weights per second, the best of three."""
    if quant == "none":
        return 0.0
    format, weight = build_format(quant), torch.randn(4096, 1024).bfloat16()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        format.quantize(weight)
        best = min(best, time.perf_counter() - start)
    return weight.numel() / best


def report(label: str, found: dict[str, float], file_gb: float) -> None:
    peak, weights = found["peak"] / 1e9, found["weights"] / 1e9
    speed = f"{found['speed'] / 1e6:.0f} M" if found["speed"] else "-"
    sizes = f"{label:<18} {peak:8.2f} {peak / file_gb:8.0%} {weights:11.2f}"
    print(f"{sizes} {found['seconds']:8.1f} {speed:>12}", flush=True)


if __name__ == "__main__":
    main()
