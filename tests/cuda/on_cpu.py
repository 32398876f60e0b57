"""The CUDA kernels compiled for the CPU, in place of the module that ``cuda_build`` builds for a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).parent / "shim"
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# of the shim: in what order threads go on, and whether asynchronous copies are made only when they are waited for
IN_ORDER = (0, False)
ORDERS = {"backwards": (1, True), "by warps": (2, True), "by warps, copies at once": (2, False), "shuffled": (3, True)}


def compiler():
    return shutil.which("g++")


def compile_library(folder, source=SHIM / "library.cpp", kernels=ROOT / "cuda"):
    """A shared library of ``source``, which includes the kernels it wants of those in ``kernels``."""
    library = folder / f"{Path(source).stem}.so"
    includes = ["-I", str(SHIM), "-I", str(kernels)]
    options = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    subprocess.run([compiler(), *options, *includes, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@contextmanager
def schedule(library, order, seed=1):
    """Kernels of ``library`` run their threads in one of ``ORDERS``."""
    library.set_schedule(*order, seed)
    yield
    library.set_schedule(*IN_ORDER, seed)


class OnCpu:
    """What ``cuda/binding.cpp`` offers; arguments are in the order of the structs the kernels take."""

    def __init__(self, library):
        self.library = library

    def wkv7_forward(self, r, w, k, v, a, b, state, y, final, checkpoints, removed):
        self._run("wkv7_forward", v, [r, w, k, v, a, b, state, y, final, checkpoints, removed])

    def wkv7_backward(self, r, w, k, v, a, b, checkpoints, removed, dy, dfinal, grads, dstate):
        self._run("wkv7_backward", v,
                  [r, w, k, v, a, b, checkpoints, removed, dy, dfinal, *(grads or [None] * 6), dstate])

    def wkv6_forward(self, *arguments):
        self._forward("wkv6_forward", *arguments)

    def wkv5_forward(self, *arguments):
        self._forward("wkv5_forward", *arguments)

    def wkv6_backward(self, *arguments):
        self._backward("wkv6_backward", *arguments)

    def wkv5_backward(self, *arguments):
        self._backward("wkv5_backward", *arguments)

    def _forward(self, name, r, w, k, v, u, state, y, final, checkpoints):
        self._run(name, v, [r, w, k, v, u, state, y, final, checkpoints])

    def _backward(self, name, r, w, k, v, u, checkpoints, dy, dfinal, grads, scratch, dstate):
        grads = grads or [None] * 5
        self._run(name, v, [r, w, k, v, u, checkpoints, dy, dfinal, *grads, scratch, dstate])

    def _run(self, name, like, tensors):
        assert all(x is None or x.is_contiguous() for x in tensors)
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        call = (ctypes.c_int64 * (len(tensors) + 3))(*(address or 0 for address in pointers), *like.shape[:3])
        failed = getattr(self.library, name)(ctypes.byref(call), ELEMENTS[like.dtype], like.shape[3])
        assert not failed


class ChunkedOnCpu:
    """What ``cuda/wkv7/chunked_binding.cpp`` offers."""

    def __init__(self, library):
        self.library = library

    def wkv7_chunked_forward(self, r, w, k, v, a, b, state, y, final, saved, chunks, first):
        self._run("wkv7_chunked_forward", v, [r, w, k, v, a, b, state, y, final, saved, chunks, first])

    def wkv7_chunked_backward(self, r, w, k, v, a, b, saved, dy, dfinal, grads, dstate, chunks, first):
        grads = grads or [None] * 6
        self._run("wkv7_chunked_backward", v, [r, w, k, v, a, b, saved, dy, dfinal, *grads, dstate, chunks, first])

    def _run(self, name, value, tensors):
        assert all(x is None or x.is_contiguous() for x in tensors)
        first = tensors[-1]
        sequences = value.shape[0] if first is None else first.shape[0] - 1
        words = [0 if x is None else x.data_ptr() for x in tensors]
        call = (ctypes.c_int64 * (len(words) + 3))(*words, sequences, value.shape[1], value.shape[2])
        assert getattr(self.library, name)(ctypes.byref(call)) == 0
