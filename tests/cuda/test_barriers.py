"""Every barrier of the CUDA kernels is needed: without one the CPU stand-in's results depend on the threads' order."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch

from rwkvpeft.ops import cuda_build
from rwkvpeft.ops.wkv6 import cuda_kernel as wkv6_kernel
from rwkvpeft.ops.wkv7 import cuda_chunked
from rwkvpeft.ops.wkv7 import cuda_kernel as wkv7_kernel

_spec = importlib.util.spec_from_file_location("cuda_on_cpu", Path(__file__).parent / "on_cpu.py")
on_cpu = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(on_cpu)

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="needs g++")

BARRIER = re.compile(r"__sync(threads|warp)\(\);")
FILES = ["wkv7/chunked_forward.cuh", "wkv7/chunked_backward.cuh", "wkv7/chunked_tiles.cuh", "wkv7/sequential.cuh",
         "common/diagonal.cuh"]


def barriers():
    for file in FILES:
        count = len(BARRIER.findall((on_cpu.ROOT / "cuda" / file).read_text()))
        for number in range(count):
            # one is enough where time is short
            marks = () if (file, number) == (FILES[0], 1) else (pytest.mark.slow,)
            yield pytest.param(file, number, id=f"{file} {number}", marks=marks)


def without(file, number, folder):
    """The kernels with one barrier less."""
    kernels = shutil.copytree(on_cpu.ROOT / "cuda", folder / "cuda")
    text = (kernels / file).read_text()
    found = list(BARRIER.finditer(text))[number]
    (kernels / file).write_text(text[: found.start()] + text[found.end() :])
    return kernels


def source(file, folder):
    """What of the kernels is needed for a file, for ctypes."""
    if "chunked" in file:
        return on_cpu.SHIM / "chunked.cpp"
    left_out = "wkv6" if "wkv7" in file else "wkv7"
    lines = (on_cpu.SHIM / "library.cpp").read_text().splitlines()
    text = "\n".join(line for line in lines if left_out not in line and "wkv5" not in line)
    (folder / "some.cpp").write_text(text)
    return folder / "some.cpp"


def run(file):
    """Everything that the kernels of a file compute of a few chunks or segments of two heads."""
    chunked = "chunked" in file
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    dtype = torch.bfloat16 if chunked else torch.float32
    names = "rwkvab" if "wkv7" in file else "rwkv"
    given = {name: (drawn(1, 50, 2, 64) / 8).to(dtype).requires_grad_() for name in names}
    if names == "rwkv":
        given["u"] = drawn(2, 64).requires_grad_()
    given["state"] = drawn(1, 2, 64, 64).requires_grad_()
    state = given["state"]
    if chunked:
        y, final = cuda_chunked.run(list(given.values())[:-1], state, None)
    else:
        y, final = (wkv7_kernel.token_by_token if names == "rwkvab" else wkv6_kernel.BACKEND.run)(**given)
    grads = torch.autograd.grad([y, final], list(given.values()), [drawn(*y.shape).to(dtype), drawn(*final.shape)])
    return [y, final, *grads]


def in_every_order(file, library, monkeypatch):
    binding = on_cpu.ChunkedOnCpu if "chunked" in file else on_cpu.OnCpu
    monkeypatch.setattr(cuda_build, "extension", lambda: binding(library))
    for order in (on_cpu.IN_ORDER, *on_cpu.ORDERS.values()):
        with on_cpu.schedule(library, order):
            yield run(file)


@pytest.mark.parametrize(("file", "number"), barriers())
def test_without_a_barrier_the_order_of_threads_tells(file, number, tmp_path, monkeypatch):
    library = on_cpu.compile_library(tmp_path, source(file, tmp_path), without(file, number, tmp_path))
    first, *others = in_every_order(file, library, monkeypatch)
    assert any(
        not torch.equal(*both) for other in others for both in zip(first, other, strict=True)
    ), "no order tells that a barrier is missing"
