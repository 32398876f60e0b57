"""Build the CUDA kernels of ``cuda/`` on first use, for the GPU at hand, and keep them for later runs.

They lie in PyTorch's folder for extensions, under a name that holds the GPU's architecture and a hash of the sources,
of PyTorch's version and of the compiler's flags: what does not fit any more is never loaded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rwkvpeft.atomic import alone
from rwkvpeft.errors import UserError
from rwkvpeft.ops.contract import Supports

SOURCES = (
    "binding.cpp",
    "wkv5/wkv5_sequential.cu",
    "wkv6/wkv6_sequential.cu",
    "wkv7/chunked.cu",
    "wkv7/chunked_binding.cpp",
    "wkv7/wkv7_sequential.cu",
)
"""What is compiled; headers are found beside them. PyTorch names objects by the last part, which must differ."""
_FLAGS = ["-O3"]
_HOW_TO = "--op triton or --op torch, which need no compiler"
_BUILT = "complete"
"""A file that says that the build beside it was not cut short."""

SUPPORTS = Supports(
    device_types=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    head_sizes=frozenset({64, 128}),
)
"""What the sequential kernels can do."""

_ALIGNMENT = 16  # bytes


def one_dtype(*operands: Tensor) -> list[Tensor]:
    """Contiguous operands of one dtype: theirs if they agree, otherwise fp32, which holds every value of the others."""
    dtypes = {x.dtype for x in operands}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [x.to(dtype).contiguous() for x in operands]


def aligned(tensor: Tensor | None) -> Tensor | None:
    """The tensor, made contiguous and copied if it does not begin where kernels can read 16 bytes at once.

    A parameter that shares its storage with others, as some optimizers want it, may begin anywhere.
    """
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def sources_folder() -> Path:
    """``cuda`` of an installed package, or of a checkout.

    Raises:
        UserError: there is neither.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cuda", package.parent / "cuda"):
        if (folder / SOURCES[0]).is_file():
            return folder
    raise UserError("the CUDA kernels' sources are missing", expected=package / "cuda",
                    fix=f"install rwkvpeft again, or {_HOW_TO}")


def build_folder() -> Path:
    """Where the kernels for this GPU, these sources and this PyTorch belong, whether they are there or not."""
    cpp = _cpp_extension()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp.get_default_build_root()
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    return Path(root) / version / _name(_architecture(), sources_folder())


def is_built() -> bool:
    """Whether the kernels are at hand for the current GPU; builds nothing."""
    if not torch.cuda.is_available():
        return False
    return (build_folder() / _BUILT).is_file()


def waits_for() -> str:
    """``Backend.waits_for`` of CUDA backends."""
    return "" if is_built() else "not built: --op cuda builds it once, in a few minutes"


@functools.cache
def extension() -> Any:
    """The module of ``cuda/binding.cpp``; builds it if need be, which takes a few minutes.

    Processes that ask at the same time wait for the one that builds; should it die, the next one builds.

    Raises:
        UserError: something the build needs is missing, or it fails; says where its whole log is.
    """
    folder = build_folder()
    if not (folder / _BUILT).is_file():
        if missing := objection():
            raise UserError("--op cuda cannot build the CUDA kernels", found=missing, fix=_HOW_TO)
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / "builder", lambda: _say("waiting for another process that builds the CUDA kernels")):
            if not (folder / _BUILT).is_file():  # nobody else has built it meanwhile
                _build(folder)
    return _import(folder)


def objection() -> str:
    """What the build needs and this machine lacks, in words; empty when nothing."""
    cpp = _cpp_extension()
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is without CUDA"
    home = cpp.CUDA_HOME
    if home is None:
        return "no CUDA toolkit: nvcc is not on PATH and CUDA_HOME is not set"
    nvcc = Path(home) / "bin" / ("nvcc.exe" if os.name == "nt" else "nvcc")
    if not nvcc.is_file():
        return f"{nvcc} does not exist: CUDA_HOME names no CUDA toolkit with a compiler"
    if not cpp.is_ninja_available():
        return "ninja is not installed: pip install ninja"
    compiler = os.environ.get("CXX", "cl" if os.name == "nt" else "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not on PATH"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        return f"{headers} does not exist: Python's headers (python3-dev) are not installed"
    toolkit = _toolkit_version(Path(home))
    if toolkit and toolkit.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        return f"CUDA toolkit {toolkit}, but PyTorch is for CUDA {torch.version.cuda}: their first numbers must agree"
    return ""


def first_error(log: str) -> str:
    """The line of a build's log that says what went wrong first; its last line if none says ``error``."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        # ninja repeats command lines, which may well contain the word
        if re.search(r"\b(fatal )?error\b\s*[:#C]|\berror\s*:|not found|cannot find|undefined reference", line):
            return line
    return lines[-1] if lines else "the compiler said nothing"


def _build(folder: Path) -> None:
    cpp = _cpp_extension()
    sources = sources_folder()
    # whoever left PyTorch's own lock here is dead: the living hold ours
    (folder / "lock").unlink(missing_ok=True)
    _say("building the CUDA kernels, once, a few minutes")
    begun = time.monotonic()
    architecture = _architecture()
    try:
        cpp.load(
            name=folder.name,
            sources=[str(sources / source) for source in SOURCES],
            extra_cflags=_FLAGS,
            extra_cuda_cflags=[*_FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}"],
            extra_include_paths=[str(sources)],
            build_directory=str(folder),
        )
    except (RuntimeError, OSError, ImportError) as reason:
        log = folder / "build.log"
        log.write_text(str(reason), encoding="utf-8")
        raise UserError(
            "--op cuda: building the CUDA kernels failed",
            found=f"{first_error(str(reason))} (the whole log: {log})",
            fix=_HOW_TO,
        ) from None
    (folder / _BUILT).touch()
    _say(f"built the CUDA kernels in {time.monotonic() - begun:.0f} s")


def _import(folder: Path) -> ModuleType:
    library = folder / f"{folder.name}{_cpp_extension().LIB_EXT}"
    try:
        spec = importlib.util.spec_from_file_location(folder.name, library)
        if spec is None or spec.loader is None:
            raise ImportError(f"{library} is no library")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as reason:
        raise UserError("--op cuda: the CUDA kernels that were built do not load", found=reason,
                        fix=f"delete {folder} to build them anew; or {_HOW_TO}") from None
    return module


def _name(architecture: str, sources: Path) -> str:
    digest = hashlib.sha256()
    for part in (torch.__version__, str(torch.version.cuda), architecture, *_FLAGS, *SOURCES):
        digest.update(part.encode() + b"\0")
    for file in sorted(sources.rglob("*")):
        if file.suffix in (".cpp", ".cu", ".cuh", ".h"):
            digest.update(file.relative_to(sources).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return f"rwkvpeft_sm{architecture}_{digest.hexdigest()[:12]}"


def _architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def _toolkit_version(home: Path) -> str:
    """``"12.8"`` of the toolkit in ``home``; empty when its header does not tell."""
    header = home / "include" / "cuda.h"
    found = re.search(r"#define CUDA_VERSION (\d+)", header.read_text(errors="ignore")) if header.is_file() else None
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else ""


def _cpp_extension() -> Any:
    # costs a second, and has side effects on some systems
    from torch.utils import cpp_extension

    return cpp_extension


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
