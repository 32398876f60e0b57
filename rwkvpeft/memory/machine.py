"""How much memory a device has."""

from __future__ import annotations

from pathlib import Path

import torch

from rwkvpeft.config.groups import RuntimeConfig

OVERHEAD_BYTES = {"cuda": 500_000_000, "cpu": 500_000_000}
"""About what is there beside tensors: a CUDA context with its libraries; on a CPU the interpreter with PyTorch and
Lightning."""


def total_memory(device_type: str) -> int | None:
    """Bytes of the device, used or not; None where they cannot be told."""
    if device_type == "cuda":
        # mem_get_info would open the first GPU in every process, each time at the cost of a CUDA context there
        return int(torch.cuda.get_device_properties(0).total_memory)
    if device_type != "cpu":
        return None
    limits = [_meminfo(("MemTotal", "SwapTotal")), _number(Path("/sys/fs/cgroup/memory.max"))]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def memory_of_each(device_type: str, runtime: RuntimeConfig) -> int | None:
    """Bytes of each of a run's devices here, the same in every process: the smallest GPU's, or a part of main memory;
    None where they cannot be told."""
    total = total_memory(device_type)
    if device_type == "cpu":
        return None if total is None else total // runtime.devices
    if device_type != "cuda":
        return total
    here = min(runtime.devices, torch.cuda.device_count())
    return min(int(torch.cuda.get_device_properties(index).total_memory) for index in range(max(here, 1)))


def free_memory(device: torch.device) -> int | None:
    """Bytes this process could still take of the device; None where they cannot be told.

    On a GPU this opens it, so that each process may only ask about its own.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        # what earlier tensors left with PyTorch's allocator, as those of programs that were tried
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    group = Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    rest = None if limit is None or used is None else limit - used
    known = [size for size in (_meminfo(("MemAvailable",)), rest) if size is not None]
    return max(0, min(known)) if known else None


def _meminfo(names: tuple[str, ...]) -> int | None:
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    sizes = {
        key: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in path.read_text().splitlines())
        if key in names
    }
    return sum(sizes.values()) or None


def _number(path: Path) -> int | None:
    """The number a file of the kernel holds; None if there is no file, or it says ``max``."""
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None
