"""Where the work runs, and in which arithmetic."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from rwkvpeft.config.groups import RuntimeConfig
from rwkvpeft.errors import UserError
from rwkvpeft.models.names import is_state

COMPUTE_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # to tell rounding from other differences
    "fp64": torch.float64,
}
"""Precision: dtype of activations and of frozen weights."""


def find_device(runtime: RuntimeConfig) -> str:
    """The device type of the run: ``cpu``, ``cuda`` or ``mps``.

    Raises: UserError if the accelerator or so many devices are not there, or cannot compute in the precision.
    """
    device_type = "cpu"
    if runtime.accelerator != "cpu":
        if torch.cuda.is_available():
            device_type = "cuda"
        elif torch.backends.mps.is_available():
            device_type = "mps"
        elif runtime.accelerator == "gpu":
            raise UserError(
                "--accelerator gpu: PyTorch sees no GPU here",
                found=f"torch {torch.__version__}",
                fix="--accelerator cpu, or install the PyTorch build for your GPU",
            )
    if runtime.devices < 1 or runtime.num_nodes < 1:
        raise UserError(
            "--devices and --num_nodes start at 1", found=f"{runtime.devices} devices, {runtime.num_nodes} machines"
        )
    available = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device_type)
    if available is not None and runtime.devices > available:
        raise UserError(
            f"--devices {runtime.devices}: this machine has fewer GPUs", found=available, fix=f"--devices {available}"
        )
    if device_type == "cuda" and runtime.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise UserError("--precision bf16: this GPU does not compute in bf16", fix="--precision fp16 or fp32")
    return device_type


def local_device(runtime: RuntimeConfig) -> torch.device:
    """This process's own device: Lightning and torchrun start one process for each, and number them in LOCAL_RANK.

    Raises: as ``find_device``.
    """
    device_type = find_device(runtime)
    if device_type != "cuda":
        return torch.device(device_type)
    return torch.device(device_type, int(os.environ.get("LOCAL_RANK", "0")))


def place_model(model: nn.Module, precision: str, device: torch.device | str = "cpu") -> None:
    """Give parameters the dtypes of a training run, and move them to ``device``.

    Frozen parameters rest in the compute dtype, trained ones in fp32 at least, so that small steps are not lost to
    rounding;
    buffers, the parts of quantised weights, keep their dtypes;
    ``model.compute_dtype`` is set. A frozen fp32 ``time_state`` stays: the recurrence starts from it in fp32.
    """
    compute = COMPUTE_DTYPES[precision]
    trained = torch.promote_types(compute, torch.float32)
    for name, parameter in model.named_parameters():
        kept = parameter.requires_grad or is_state(name)
        parameter.data = parameter.data.to(device=device, dtype=trained if kept else compute)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    model.compute_dtype = compute  # type: ignore[assignment]


@contextmanager
def matmul_precision(precision: str) -> Generator[None, None, None]:
    """Inside the block fp32 matrix products are as exact as asked: rounded to tf32 where hardware has it, or full."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
