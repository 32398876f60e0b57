"""Measure the peak host memory of merging an adapter into a large model, each merge in a process of its own.

    python benchmarks/merge_memory.py --methods lora,pissa,dora,bat --quant none,nf4

Writes a random v7 checkpoint in bf16, by default of the 1.5B model's shape (3.1 GB), and for each method an adapter of
random values. The peak is VmHWM of ``/proc/self/status`` (Linux), less what the process had when merge.py's parts were
imported; beside it stands the bound: twice the model's largest tensor and the adapter.
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
from load_memory import peak_bytes, write_random

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import Recipe, save_adapter
from rwkvpeft.checkpoints.load import build_model
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.models.shape import ModelShape, new_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="lora,pissa,dora,miss,bat,state")
    parser.add_argument("--quant", default="none,nf4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=2048)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--folder", help="where the files are written for the time being")
    parser.add_argument("--merge", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.merge:
        print(json.dumps(merge(*options.merge, options.quant)))
        return
    shape = new_shape("x070", n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base = Path(folder) / "base.pth"
        write_random(base, shape)
        largest = max(2 * parameter.numel() for parameter in build_model(shape, lambda **_: None).parameters())
        print(f"{options.n_layer} layers of width {options.n_embd}, file {base.stat().st_size / 1e9:.2f} GB, "
              f"largest tensor {largest / 1e6:.0f} MB")
        print(f"{'method':<8} {'--quant':<8} {'adapter MB':>10} {'peak MB':>8} {'bound MB':>9} {'seconds':>8}")
        for method in options.methods.split(","):
            adapter = write_adapter(Path(folder) / f"{method}.pth", method, shape, options.rank)
            size = adapter.stat().st_size
            for quant in options.quant.split(","):
                found = run(base, adapter, quant)
                print(f"{method:<8} {quant:<8} {size / 1e6:10.0f} {found['peak'] / 1e6:8.0f} "
                      f"{(2 * largest + size) / 1e6:9.0f} {found['seconds']:8.0f}", flush=True)


def write_adapter(path: Path, method: str, shape: ModelShape, rank: int) -> Path:
    """An adapter of random values on every large linear."""
    adapter = build_adapter(method, {} if method == "state" else {"r": rank})
    model = build_model(shape, lambda **_: None)
    if method == "pissa":
        # shapes alone matter: an SVD of every matrix would take minutes
        adapter = build_adapter("lora", {"r": rank})
    adapter.attach(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.own_tensors(model).items()}
    if method == "pissa":
        shapes |= {name.replace(".lora_", ".init_lora_"): size for name, size in shapes.items()}
    tensors = {name: torch.full(size, 1e-3) for name, size in shapes.items()}
    settings = {} if method == "state" else {"r": rank}
    save_adapter(path, tensors, Recipe(method=method, config=settings))
    return path


def run(base: Path, adapter: Path, quant: str) -> dict[str, float]:
    """Merge in a fresh process."""
    files = [str(base), str(adapter), str(base.parent / "out.pth")]
    words = [sys.executable, __file__, "--quant", quant, "--merge", *files]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def merge(base: str, adapter: str, output: str, quant: str) -> dict[str, float]:
    if quant in ("int8", "nf4", "fp4"):
        import bitsandbytes  # noqa: F401  its import is not part of a merge
    before, start = peak_bytes(), time.perf_counter()
    merge_files(base, adapter, output, quant=quant)
    return {"peak": peak_bytes() - before, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main()
