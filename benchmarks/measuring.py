"""What the benchmarks share: clocks, ceilings of the machine, errors, other people's functions, tables and JSON."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvpeft.atomic import write_whole

_MOST_INNER = 50


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def fastest(runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 5) -> dict[str, float]:
    """Seconds of each run, the smallest of ``rounds``; runs take turns, so that a busy machine slows all alike.

    On a GPU many calls are queued between two events: what is timed is a stream of calls, as in training.
    """
    inner = {}
    for name, run in runs.items():
        run()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        once = time.perf_counter() - start
        inner[name] = 1 if device.type == "cpu" else max(1, min(_MOST_INNER, round(0.01 / max(once, 1e-6))))
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], _seconds(run, inner[name], device))
    return best


def _seconds(run: Callable[[], object], times: int, device: torch.device) -> float:
    if device.type != "cuda":
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times / 1e3


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """What ``run`` allocates beyond what was there, at its worst moment; None where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, measured."""
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / fastest({"": lambda: a @ b}, device)[""]


def copy_peak(device: torch.device) -> float:
    """Bytes/s of reading and writing memory, measured by copying."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**23, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest({"": lambda: target.copy_(source)}, device)[""]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; entries all below 1e-4 count as 1e-4, an empty tensor's error is 0.

    Infinite where ``found`` is not finite or has another shape.
    """
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return math.inf
    floor = 1e-4 * max(1, expected.numel()) ** 0.5
    return float((found - expected).norm() / expected.norm().clamp(min=floor))


def load_function(place: str) -> Callable[..., Any]:
    """The function at ``package.module:name`` or ``path/to/file.py:name``."""
    module_name, _, name = place.rpartition(":")
    if not module_name:
        raise SystemExit(f"{place}: expected MODULE:FUNCTION or FILE.py:FUNCTION")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None:
            raise SystemExit(f"{place}: no such file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))
        module = importlib.import_module(module_name)
    function: Callable[..., Any] = getattr(module, name)
    return function


def machine(device: torch.device) -> dict[str, str]:
    """Names and versions that a figure depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    found = {"device": name, "torch": torch.__version__}
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.import_module("triton").__version__
    return found


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same keys as columns; numbers to three digits, None as a dash."""
    if not rows:
        return
    cells = [[_cell(row.get(column)) for column in rows[0]] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(rows[0])]
    for line in [list(rows[0]), *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def write_json(path: str, record: Mapping[str, Any]) -> None:
    """Write ``record`` to ``path``, whole or not at all; no path writes nothing."""
    if path:
        text = json.dumps(record, indent=1)
        write_whole(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))
