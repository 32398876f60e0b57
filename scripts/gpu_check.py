"""Everything there is to measure on a GPU, in under nine minutes: one JSON file, one table.

    python scripts/gpu_check.py --out gpu_check                       on one idle GPU
    python scripts/gpu_check.py --peer official=../RWKV-LM wind=../wind_rwkv fla=../fla_folder
    python scripts/gpu_check.py --small                               in miniature on a CPU, Triton interpreted

Side by side, since they need no quiet: the CUDA kernels and the peers' are built, and every operator on every backend
is held to fp64 on inputs that break naive kernels. Then one after another: times of the WKV operators at five shapes
beside peers and floors, a block's operators and the loss head, whole LoRA steps from 0.1B to 7.2B with their memory,
loss curves over 200 steps, what a small run's memory goes to, and steps replayed as a CUDA graph. Each stage is a
process of its own with a limit: what fails or takes too long is recorded, and the rest goes on. OUT/results.json is
written after every stage, OUT/STAGE.log holds what a stage said.

Peers are compiled where they lie (see benchmarks/peers.py). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
LIMIT = 520.0
_POLL = 0.2
_TAIL = 6

_BUILD = """
import sys, time, torch
from rwkvpeft.ops.contract import Needs
from rwkvpeft.ops.trial import errors_of
from rwkvpeft.registry import BACKENDS, find
for operator, row in BACKENDS.items():
    if "cuda" in row:
        start = time.time()
        backend = find(row, "cuda", flag="--op")
        errors = errors_of(backend.run, operator, Needs("cuda", torch.bfloat16, 64, True), "cuda")
        print(f"{operator}: {time.time() - start:.0f} s, worst error {max(errors.values()):.1e}", flush=True)
    else:
        print(f"{operator}: no CUDA program in this version", flush=True)
"""
_BUILD_PEER = "import sys; sys.path.insert(0, {folder!r}); import peers; peers.load_peer({peer!r}); print('built')"


@dataclass(frozen=True)
class Stage:
    """One process.

    Args:
        words: what Python is given; ``{json}`` stands for the file the stage writes its record to.
        seconds: its limit.
        together: whether it may run beside others.
    """

    name: str
    words: Sequence[str]
    seconds: float
    together: bool = False


def stages(peers: Sequence[str]) -> list[Stage]:
    """On a GPU."""
    wkv, device = str(BENCHMARKS / "wkv.py"), ["--device", "cuda", "--json", "{json}"]
    steps = [str(BENCHMARKS / "training_step.py"), *device, "--seconds", "1.5"]
    others = ["--peer", *peers] if peers else []
    # a step needs wkv7 with gradients in our model's layout, which the sequential kernel of upstream gives
    official = [peer for peer in peers if peer.startswith("official=")]
    found = [Stage("build", ["-c", _BUILD], 200, together=True)]
    found += [
        Stage(f"build {peer.partition('=')[0]}", ["-c", _BUILD_PEER.format(folder=str(BENCHMARKS), peer=peer)], 200,
              together=True)
        for peer in peers
    ]
    found += [
        Stage(f"errors wkv{version}", [wkv, "--hard", "--versions", version, "--backends", "triton", "fla", "torch",
                                       *device], 150, together=True)
        for version in "765"
    ]
    found += [
        Stage("errors cuda", [wkv, "--hard", "--backends", "cuda", *device], 60),
        Stage("times wkv7", [wkv, "--versions", "7", "--rounds", "3", *others, *device], 90),
        Stage("steps", [*steps, "--sizes", "0.1B", "0.4B", "1.5B", "2.9B", "7.2B", "--micro_bsz", "1", "8",
                        "--grad_cp", "1"], 130),
        Stage("curves", [str(BENCHMARKS / "loss_curve.py"), *device], 80),
        Stage("block", [str(BENCHMARKS / "block.py"), "--rounds", "3", *device], 50),
        Stage("times wkv6 wkv5", [wkv, "--versions", "6", "5", "--rounds", "3", "--shapes", "1x1024x32x64",
                                  "4x4096x32x64", *device], 45),
        Stage("steps, nothing twice", [*steps, "--sizes", "0.1B", "0.4B", "1.5B", "2.9B", "--grad_cp", "0",
                                       "selective"], 60),
        Stage("memory", [str(BENCHMARKS / "memory_parts.py"), *device], 40),
        Stage("steps, replayed", [*steps, "--sizes", "0.1B", "0.4B", "--micro_bsz", "1", "--cuda_graph", "false",
                                  "true"], 45),
        Stage("curves, replayed", [str(BENCHMARKS / "loss_curve.py"), *device, "--backends", "triton", "--steps", "100",
                                   "--cuda_graph", "false", "true"], 45),
    ]
    if official:
        # upstream's way: its kernel, everything else in PyTorch, whole blocks twice
        found.append(Stage("steps, upstream's way", [*steps, "--sizes", "0.1B", "1.5B", "--micro_bsz", "1", "8",
                                                     "--grad_cp", "1", "--fused_kernel", "false", "--peer", *official],
                           60))
    return found


def small_stages() -> list[Stage]:
    """The same on a CPU, in miniature."""
    wkv = str(BENCHMARKS / "wkv.py")
    record = ["--json", "{json}"]
    shape = ["--shapes", "1x17x1x64"]
    return [
        *(Stage(f"errors wkv{version}", [wkv, "--hard", "--versions", version, "--backends", "triton", "torch", "--few",
                                         *record], 150, together=True) for version in "765"),
        Stage("times wkv7", [wkv, "--versions", "7", "--rounds", "1", "--backends", "triton", "torch", *shape, *record],
              100),
        Stage("steps", [str(BENCHMARKS / "training_step.py"), "--sizes", "tiny", "--ctx_len", "17", "--seconds", "0.1",
                        "--fused_kernel", "false", *record], 100),
        Stage("curves", [str(BENCHMARKS / "loss_curve.py"), "--size", "tiny", "--steps", "4", "--ctx_len", "33",
                         "--precision", "fp32", *record], 100),
        Stage("memory", [str(BENCHMARKS / "memory_parts.py"), "--size", "tiny", "--ctx_len", "17", *record], 60),
        Stage("block", [str(BENCHMARKS / "block.py"), "--rounds", "1", "--programs", "triton", "torch",
                        "--vocab_size", "256", "--shapes", "1x17x1x64", *record], 100),
        Stage("times wkv6 wkv5", [wkv, "--versions", "6", "5", "--rounds", "1", "--backends", "torch", *shape, *record],
              100),
    ]


class Running:
    """A stage's process, its output in a file."""

    def __init__(self, stage: Stage, out: Path, environment: Mapping[str, str], limit: float) -> None:
        self.stage = stage
        self.name = stage.name.replace(" ", "_").replace(",", "").replace("'", "")
        self.record = out / f"{self.name}.json"
        self.log = out / f"{self.name}.log"
        self.record.unlink(missing_ok=True)
        self.begin = time.monotonic()
        self.limit = limit
        words = [word.replace("{json}", str(self.record)) for word in stage.words]
        self.output = self.log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=dict(environment), stdout=self.output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def over(self) -> bool:
        """Whether it has ended; one that has had its time is ended."""
        if self.process.poll() is None and time.monotonic() - self.begin > self.limit:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return self.process.poll() is not None

    def outcome(self) -> dict[str, Any]:
        """What it measured, even if it was ended before it was done, and its last words."""
        self.output.close()
        code = self.process.returncode
        spent = time.monotonic() - self.begin
        status = "done" if code == 0 else "out of time" if spent > self.limit else f"failed, exit code {code}"
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            record = None
        words = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"status": status, "seconds": round(spent, 1), "record": record, "said": words[-_TAIL:]}


def run(plan: Sequence[Stage], out: Path, environment: Mapping[str, str], limit: float) -> dict[str, Any]:
    """Run the stages within ``limit`` seconds; results.json is there from the first one on."""
    end = time.monotonic() + limit
    results: dict[str, Any] = {"machine": _machine(), "stages": {}}
    first = [stage for stage in plan if stage.together]
    for group in [first, *([stage] for stage in plan if not stage.together)]:
        left = end - time.monotonic()
        if left < 1:
            results["stages"] |= {stage.name: {"status": "no time left", "record": None} for stage in group}
            continue
        running = [Running(stage, out, environment, min(stage.seconds, left)) for stage in group]
        while running:
            ended = [one for one in running if one.over()]
            for one in ended:
                running.remove(one)
                outcome = one.outcome()
                results["stages"][one.stage.name] = outcome
                print(f"{one.stage.name}: {outcome['status']}, {outcome['seconds']} s", flush=True)
                _write(out / "results.json", results)
            if not ended:
                time.sleep(_POLL)
    _write(out / "results.json", results)
    return results


def _machine() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "no GPU that nvidia-smi knows"


def _write(path: Path, results: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    partial.replace(path)


def summary(results: Mapping[str, Any]) -> list[str]:
    """The one table: a line for every figure somebody will ask for."""
    lines = [f"machine: {results['machine']}"]
    for name, stage in results["stages"].items():
        lines.append(f"-- {name}: {stage['status']}")
        rows = (stage["record"] or {}).get("rows") or []
        if name.startswith("errors"):
            lines += _errors(rows)
        elif name.startswith("times"):
            lines += _times(rows)
        else:
            lines += [", ".join(f"{key} {_short(value)}" for key, value in row.items() if value is not None)
                      for row in rows]
        if stage["status"] != "done" or not rows:
            lines += [f"   {word}" for word in stage.get("said", [])]
    return lines


def _errors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for key in dict.fromkeys((row["operator"], row["backend"]) for row in rows):
        own = [row for row in rows if (row["operator"], row["backend"]) == key]
        bad = [row for row in own if row["verdict"] != "right"]
        lines.append(f"{key[0]} {key[1]}: {len(own) - len(bad)} of {len(own)} inputs right")
        lines += [f"   {row['input']}: {row['verdict']}, {row['of']} {_short(row['error'])}, "
                  f"{_short(row['allowed'])} allowed" for row in bad]
    return lines


def _times(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each shape's implementations, the fastest first, with their share of the floor."""
    lines = []
    for key in dict.fromkeys((row["operator"], row["shape"]) for row in rows):
        own = [row for row in rows if (row["operator"], row["shape"]) == key]
        timed = sorted((row for row in own if row["fwd+bwd ms"]), key=lambda row: row["fwd+bwd ms"])
        lines.append(f"{key[0]} {key[1]}: floor {_short(own[0]['floor ms'])} ms, "
                     f"products of the layer {_short(own[0]['products ms'])} ms")
        lines += [f"   {row['backend']:14} {_short(row['fwd ms'])} forward, {_short(row['fwd+bwd ms'])} both, "
                  f"errors {_short(row['y'])} of y, {_short(row['worst'])} of {row['of']}" for row in timed]
        lines += [f"   {row['backend']:14} failed: {row['of']}" for row in own if row not in timed]
    return lines


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def sees_gpu() -> bool:
    """Asked in another process: one that holds a context on the GPU would disturb what is measured."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question]).returncode == 0


def main() -> int:
    """Run the stages. Returns 0 if all of them came to their end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), metavar="FOLDER")
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these stages; their names as printed")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="for everything (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="in miniature on a CPU")
    options = parser.parse_args()
    peers = ["=".join([name, str(Path(path).resolve())]) for name, _, path in (p.partition("=") for p in options.peer)]
    if not options.small and not sees_gpu():
        parser.error("PyTorch sees no NVIDIA GPU here (python -c 'import torch; print(torch.cuda.is_available())'); "
                     "--small runs everything in miniature on a CPU")
    plan = small_stages() if options.small else stages(peers)
    plan = [stage for stage in plan if not options.only or stage.name in options.only]
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if options.small:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    results = run(plan, out, environment, options.seconds)
    text = "\n".join(summary(results))
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(stage["status"] == "done" for stage in results["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
