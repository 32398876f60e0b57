"""Other people's wkv7, from a checkout of theirs: nothing of theirs is here, their files are compiled where they lie.

``NAME=PATH`` on a benchmark's command line loads one of these:

    official       the sequential kernel of RWKV-LM or RWKV-PEFT        a checkout of either
    official_h100  its variant for H100                                 a checkout of RWKV-LM
    wind           wind_rwkv's chunked kernel                           a checkout of wind_rwkv
    wind_longhead  its sequential kernel with the value rows split      a checkout of wind_rwkv
    fla            flash-linear-attention through our boundary          a folder that holds the package ``fla``

All take bf16, head size 64, no state, and except fla a multiple of 16 tokens.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Wkv7 = Callable[..., tuple[Tensor, Tensor | None]]
"""Keyword-only r, w (the raw decay logit), k, v, a, b, (B, T, H, N) each, and state; gives y and a state or None."""

_N, _CHUNK = 64, 16
_FLAGS = ["-O3", "--use_fast_math", "--extra-device-vectorization", "-Xptxas", "-O3"]


def load_peer(text: str) -> tuple[str, Wkv7]:
    """Name and function of a peer given as ``NAME=PATH``."""
    name, _, path = text.partition("=")
    if name not in _LOADERS or not path:
        raise SystemExit(f"--peer {text}: expected NAME=PATH with NAME one of {', '.join(_LOADERS)}")
    if not Path(path).is_dir():
        raise SystemExit(f"--peer {text}: no such folder")
    return name, _LOADERS[name](Path(path).resolve())


def _official(checkout: Path) -> Wkv7:
    return _sequential(checkout, "rwkv7_clampw", ["rwkv7_clampw.cu", "rwkv7_clampw.cpp"])


def _official_h100(checkout: Path) -> Wkv7:
    return _sequential(checkout, "rwkv7_clampw_v3", ["rwkv7_clampw_v3_for_h100.cu", "rwkv7_clampw_v3.cpp"])


def _sequential(checkout: Path, library: str, names: list[str]) -> Wkv7:
    from torch.utils.cpp_extension import load

    folders = [checkout / "cuda", checkout / "RWKV-v7" / "train_temp" / "cuda", checkout]
    folder = next((folder for folder in folders if (folder / names[0]).is_file()), None)
    if folder is None:
        raise SystemExit(f"{checkout} holds no {names[0]}")
    flags = [*_FLAGS, f"-D_N_={_N}", f"-D_CHUNK_LEN_={_CHUNK}"]
    load(library, [str(folder / name) for name in names], is_python_module=False, extra_cuda_cflags=flags)
    ops = getattr(torch.ops, library)

    class Sequential(torch.autograd.Function):
        """Their calls, with the buffers they expect."""

        @staticmethod
        def forward(ctx, *operands):
            batch, tokens, heads, size = operands[0].shape
            y = torch.empty_like(operands[3])
            states = y.new_empty(batch, heads, tokens // _CHUNK, size, size, dtype=torch.float32)
            answers = y.new_empty(y.shape, dtype=torch.float32)
            ops.forward(*operands, y, states, answers)
            ctx.save_for_backward(*operands, states, answers)
            return y

        @staticmethod
        def backward(ctx, dy):
            *operands, states, answers = ctx.saved_tensors
            grads = [torch.empty_like(operand) for operand in operands]
            ops.backward(*operands, dy.contiguous(), states, answers, *grads)
            return tuple(grads)

    def wkv7(*, r, w, k, v, a, b, state=None):
        return Sequential.apply(*(_plain(operand) for operand in (r, w, k, v, a, b))), None

    return wkv7


def _wind(checkout: Path) -> Wkv7:
    return _of_wind(checkout, "chunked_cuda")


def _wind_longhead(checkout: Path) -> Wkv7:
    return _of_wind(checkout, "backstepping_longhead")


def _of_wind(checkout: Path, kernel: str) -> Wkv7:
    sys.path.insert(0, str(checkout))
    module = importlib.import_module(f"wind_rwkv.rwkv7.{kernel}.{kernel}")
    getattr(module, f"load_{kernel}")(_N)
    attend = getattr(module, f"attn_{kernel}")

    def wkv7(*, r, w, k, v, a, b, state=None):
        # it takes the logarithm of minus the log decay
        rate = -F.softplus(-w.float()) - 0.5
        y, _ = attend(*(_plain(operand) for operand in (r, rate, k, v, a, b)))
        return y, None

    return wkv7


def _plain(operand: Tensor) -> Tensor:
    return operand.to(torch.bfloat16).contiguous()


def _fla(folder: Path) -> Wkv7:
    sys.path.insert(0, str(folder))
    return importlib.import_module("rwkvpeft.ops.wkv7.fla_kernel").wkv7


_LOADERS: dict[str, Callable[[Path], Wkv7]] = {
    "official": _official,
    "official_h100": _official_h100,
    "wind": _wind,
    "wind_longhead": _wind_longhead,
    "fla": _fla,
}
