"""How much memory a device has."""

from __future__ import annotations

from pathlib import Path

import torch


def total_memory(device_type: str) -> int | None:
    """Bytes of the device, used or not; None where they cannot be told."""
    if device_type == "cuda":
        # mem_get_info would open the first GPU in every process, each time at the cost of a CUDA context there
        return int(torch.cuda.get_device_properties(0).total_memory)
    if device_type != "cpu":
        return None
    limits = [_meminfo_total(Path("/proc/meminfo")), _cgroup_limit(Path("/sys/fs/cgroup/memory.max"))]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _meminfo_total(path: Path) -> int | None:
    if not path.is_file():
        return None
    sizes = {
        key: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in path.read_text().splitlines())
        if key in ("MemTotal", "SwapTotal")
    }
    return sum(sizes.values()) or None


def _cgroup_limit(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None
