#!/usr/bin/env python
"""Compile every Triton kernel, exactly as the operators launch it, for GPUs that are not here; report what it takes.

    python scripts/kernel_report.py                    every case, every architecture
    python scripts/kernel_report.py wkv7 --archs 80 90 one group of cases
    python scripts/kernel_report.py --json report.json

The operators are called on CPU tensors while Triton believes in a GPU and stops short of launching. Columns: registers
a thread, bytes spilled (stores + loads), shared memory a block. Exit code 1 if a kernel does not compile, needs more
shared memory than the architecture has, or spills more than a few bytes: the assembler gives away a register or two of
its own accord where one more block then fits on a multiprocessor.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# largest shared memory of a block, in bytes (CUDA C++ programming guide, table of compute capabilities)
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
FEW_BYTES = 64
"""Spilled, that a kernel may: they stay in the first-level cache."""
GROUPS = ("wkv7", "diagonal", "block", "loss")


class FakeGpu:
    """What Triton asks its driver before it compiles."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")


def compile_group(group: str, arch: int) -> list[dict[str, Any]]:
    """Run a group's cases; one row for each kernel variant, an error as a row of its own."""
    import triton
    from triton.runtime import driver

    driver.set_active(FakeGpu(arch))
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    launch = triton.JITFunction.run
    case = ""

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            rows.append({"kernel": kernel.__name__, "case": case, "warps": compiled.metadata.num_warps,
                         "stages": compiled.metadata.num_stages, "shared": compiled.metadata.shared,
                         **resources(compiled.asm["ptx"], arch)})
        return compiled

    triton.JITFunction.run = compile_only
    try:
        cases: dict[str, Callable[[], object]] = importlib.import_module(f"kernel_cases.{group}").CASES
        for case, run in cases.items():
            try:
                run()
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises is the report
                rows.append({"kernel": "?", "case": case, "error": f"{type(error).__name__}: {error}"[-600:]})
    finally:
        triton.JITFunction.run = launch
    return [{"arch": arch, "group": group, **row} for row in rows]


def resources(ptx: str, arch: int) -> dict[str, int]:
    """Registers a thread and bytes of spills, as Triton's own assembler tells them."""
    target = re.search(r"\.target (\w+)", ptx)
    name = target[1] if target else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        told = subprocess.run(
            [assembler(arch), "-v", f"--gpu-name={name}", source, "-o", source.with_suffix(".o")],
            capture_output=True, text=True, check=True,
        ).stderr
    registers = re.search(r"Used (\d+) registers", told)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill", told)]
    return {"registers": int(registers[1]) if registers else 0, "spills": sum(spills)}


def assembler(arch: int) -> str:
    """The program that this version of Triton assembles with for an architecture: newer ones bring two."""
    from triton.backends.nvidia import compiler

    if not hasattr(compiler, "get_ptxas"):
        return str(compiler._path_to_binary("ptxas")[0])
    found = compiler.get_ptxas(arch)
    return str(found[0] if isinstance(found, tuple) else found.path)


def complaint(row: dict[str, Any]) -> str:
    """Why a row makes the report fail; empty if it does not."""
    if "error" in row:
        return row["error"]
    if row["spills"] > FEW_BYTES:
        return f"spills {row['spills']} bytes"
    if row["shared"] > SHARED[row["arch"]]:
        return f"needs {row['shared']} bytes of shared memory, sm_{row['arch']} has {SHARED[row['arch']]}"
    return ""


def main() -> int:
    """Each architecture in a process of its own: Triton keeps what it was told of the first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", default=[], help=f"of {', '.join(GROUPS)}; all when left out")
    parser.add_argument("--archs", nargs="*", type=int, default=list(SHARED))
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    if args.one:
        sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
        print(json.dumps([row for group in args.groups for row in compile_group(group, args.archs[0])]))
        return 0
    rows: list[dict[str, Any]] = []
    for arch in args.archs:
        command = [sys.executable, __file__, *(args.groups or GROUPS), "--one", "--archs", str(arch)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        figures = "" if "error" in row else (f"{row['registers']:4} registers {row['spills']:6} spilled "
                                             f"{row['shared']:7} shared {row['warps']} warps")
        print(f"sm_{row['arch']:<4} {row['kernel']:36} {row['case']:28} {figures} {complaint(row)}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    failed = sum(bool(complaint(row)) for row in rows)
    print(f"{len(rows)} kernels compiled, {failed} with complaints")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
