#!/usr/bin/env python
"""Compile every CUDA kernel for GPUs that are not here, and report what it takes.

    python scripts/compile_cuda.py                       every architecture
    python scripts/compile_cuda.py --archs 80 90a        some
    python scripts/compile_cuda.py --json report.json

Needs nvcc, not PyTorch: the kernels are compiled, not what binds them to tensors. Columns: registers a thread, bytes
spilled (stores + loads), static shared memory a block (some kernels ask for more when launched). Exit code 1 if a
source does not compile or a kernel spills.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "cuda"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


class Kernel(TypedDict):
    """What one kernel takes on one architecture."""

    architecture: str
    source: str
    kernel: str
    registers: int
    spilled: int
    shared: int


def compile_source(source: Path, architecture: str) -> str:
    """The compiler's remarks on a source.

    Raises:
        SystemExit: it does not compile; says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-I", str(SOURCES),
                   f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
                   "-c", str(source), "-o", f"{folder}/object.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source.relative_to(ROOT)} does not compile for sm_{architecture}:\n{done.stderr}")
    return done.stderr


def kernels_in(remarks: str, source: str, architecture: str) -> list[Kernel]:
    """What ``-Xptxas -v`` says of each kernel."""
    found: list[Kernel] = []
    for part in remarks.split("Compiling entry function '")[1:]:
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if spilled is None or registers is None:
            raise SystemExit(f"the compiler's remarks are not understood:\n{part}")
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(Kernel(
            architecture=architecture, source=source, kernel=part.partition("'")[0],
            registers=int(registers[1]), spilled=int(spilled[1]) + int(spilled[2]),
            shared=int(shared[1]) if shared else 0,
        ))
    return found


def readable(names: list[str]) -> list[str]:
    """Names as they are written, without the namespaces, arguments and return types."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    plain = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"rwkvpeft::|\((int|bool)\)|^void |\(rwkvpeft.*$|\([A-Z]\w+\)$", "", line)
            for line in plain.splitlines()]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="files below cuda/; default: all")
    parser.add_argument("--archs", nargs="+", default=ARCHITECTURES, help="e.g. 80 90a; default: all supported")
    parser.add_argument("--json", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        parser.error("nvcc is not on PATH: install NVIDIA's CUDA toolkit, or add its bin folder to PATH")
    sources = [SOURCES / name for name in arguments.sources] or sorted(SOURCES.rglob("*.cu"))
    rows: list[Kernel] = []
    for architecture in arguments.archs:
        for source in sources:
            name = source.relative_to(SOURCES).as_posix()
            kernels = kernels_in(compile_source(source, architecture), name, architecture)
            for kernel, plain in zip(kernels, readable([row["kernel"] for row in kernels]), strict=True):
                kernel["kernel"] = plain
                print(f"sm_{architecture:<5} {kernel['registers']:>3} registers {kernel['spilled']:>4} spilled "
                      f"{kernel['shared']:>6} shared  {name}: {plain}", flush=True)
            rows += kernels
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    spilling = sum(row["spilled"] > 0 for row in rows)
    print(f"{len(rows)} kernels, {spilling} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
