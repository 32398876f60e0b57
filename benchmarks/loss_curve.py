"""Does training go the same way on every backend? Loss curves from the same weights over the same text.

    python benchmarks/loss_curve.py --size tiny --steps 50              on a CPU
    python benchmarks/loss_curve.py --device cuda --size 0.1B           200 steps of every backend there

Every weight of a randomly made model is trained on the bytes of this repository's README. A backend's curve is compared
with the first one's in ``--backends``: the largest and the mean difference, which should stay below 0.01 (after the
first tenth of the steps, where the loss falls steeply and rounding alone moves it).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import machine, print_table, write_json
from torch import Tensor
from whole_step import SIZES, Settings, WholeStep, batch_of

from rwkvpeft.cli.guard import guarded
from rwkvpeft.ops.bench import first_line
from rwkvpeft.registry import BACKENDS

TEXT = Path(__file__).resolve().parents[1] / "README.md"


def curve(settings: Settings, steps: int) -> list[float]:
    """The loss of every step."""
    step = WholeStep(settings)
    text = torch.tensor(list(TEXT.read_bytes()), device=settings.device)
    generator = torch.Generator().manual_seed(0)
    losses: list[Tensor] = []
    for _ in range(steps):
        starts = torch.randint(len(text) - settings.ctx_len - 1, (settings.micro_bsz,), generator=generator)
        rows = torch.stack([text[start : start + settings.ctx_len + 1] for start in starts.tolist()])
        losses.append(step.run(batch_of(rows)))
    return torch.stack(losses).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.1B")
    parser.add_argument("--version", default="x070", choices=["x052", "x060", "x070"])
    parser.add_argument("--backends", nargs="+", metavar="NAME",
                        help="the first is what the others are compared with (default: torch and the GPU's programs)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--micro_bsz", type=int, default=2)
    parser.add_argument("--ctx_len", type=int, default=256)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--fused_kernel", nargs="+", default=["auto"], choices=["auto", "true", "false"])
    parser.add_argument("--cuda_graph", nargs="+", default=["false"], choices=["true", "false"])
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    operator = {"x052": "wkv5", "x060": "wkv6", "x070": "wkv7"}[options.version]
    others = [name for name in BACKENDS[operator] if name not in ("torch", "reference")]
    backends = options.backends or ["torch", *(others if options.device.type == "cuda" else [])]
    record: dict[str, Any] = {"machine": machine(options.device), "curves": {}, "rows": []}
    first: list[float] | None = None
    for backend in backends:
        for fused, graph in itertools.product(options.fused_kernel, options.cuda_graph):
            name = backend if fused == "auto" else f"{backend}, fused {fused}"
            name += ", replayed" if graph == "true" else ""
            settings = Settings(options.size, "none", options.micro_bsz, options.ctx_len, op=backend,
                                fused_kernel=fused, version=options.version, precision=options.precision,
                                device=options.device, lr=options.lr, cuda_graph=graph == "true")
            try:
                losses = curve(settings, options.steps)
            except Exception as reason:  # noqa: BLE001 a backend that fails is a figure too
                record["rows"].append({"curve": name, "first": None, "last": None, "largest difference": None,
                                       "mean difference": None, "failed": first_line(reason)})
                continue
            first = first or losses
            calm = len(losses) // 10
            away = [abs(a - b) for a, b in zip(losses, first, strict=True)][calm:]
            record["curves"][name] = losses
            record["rows"].append({"curve": name, "first": losses[0], "last": losses[-1],
                                   "largest difference": max(away), "mean difference": sum(away) / len(away),
                                   "failed": None})
            write_json(options.json, record)
    print_table(record["rows"])
    write_json(options.json, record)


if __name__ == "__main__":
    sys.exit(guarded(main))
