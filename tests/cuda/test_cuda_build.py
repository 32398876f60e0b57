"""Building the CUDA kernels on first use: what is said, what is kept, and what stops it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkvpeft.errors import UserError
from rwkvpeft.ops import cuda_build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a GPU and a whole CUDA toolkit, whose compiler writes an empty library."""
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").touch()
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cuda.h").write_text("#define CUDA_VERSION 12080\n")
    found = SimpleNamespace(
        CUDA_HOME=str(toolkit), LIB_EXT=".so", builds=0, is_ninja_available=lambda: True,
        get_default_build_root=lambda: str(tmp_path / "extensions"),
    )

    def load(name, build_directory, **_):
        found.builds += 1
        (Path(build_directory) / f"{name}.so").touch()

    found.load = load
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(cuda_build, "_cpp_extension", lambda: found)
    monkeypatch.setattr(cuda_build, "_import", lambda folder: folder.name)
    monkeypatch.setattr(cuda_build, "_architecture", lambda: "90")
    monkeypatch.setattr(cuda_build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda_build.extension.cache_clear()
    yield found
    cuda_build.extension.cache_clear()


def again():
    """As another process would ask."""
    cuda_build.extension.cache_clear()
    return cuda_build.extension()


def test_the_first_use_builds_and_says_so_and_later_ones_do_not(machine, capsys):
    assert not cuda_build.is_built()
    assert cuda_build.waits_for().startswith("not built")
    cuda_build.extension()
    said = capsys.readouterr().err
    assert "a few minutes" in said
    assert "built the CUDA kernels in 0 s" in said
    assert cuda_build.is_built()
    assert cuda_build.waits_for() == ""
    again()
    assert machine.builds == 1
    assert capsys.readouterr().err == ""


def test_other_sources_another_gpu_or_another_pytorch_are_built_anew(machine, tmp_path, monkeypatch):
    names = {again()}
    monkeypatch.setattr(cuda_build, "_architecture", lambda: "80")
    names.add(again())
    monkeypatch.setattr(torch, "__version__", "2.99")
    names.add(again())
    sources = tmp_path / "cuda"
    shutil.copytree(ROOT / "cuda", sources)
    with (sources / "common" / "device.cuh").open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(cuda_build, "sources_folder", lambda: sources)
    names.add(again())
    assert len(names) == machine.builds == 4


def test_a_build_that_was_cut_short_is_done_again_in_spite_of_its_lock(machine):
    folder = cuda_build.build_folder()
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / f"{folder.name}.so").touch()
    assert not cuda_build.is_built()
    cuda_build.extension()
    assert machine.builds == 1
    assert not (folder / "lock").exists()


def test_a_process_that_died_while_building_holds_nobody_up(machine):
    folder = cuda_build.build_folder()
    folder.mkdir(parents=True)
    die_in_the_lock = (
        "import os, pathlib, sys\n"
        "from rwkvpeft.atomic import alone\n"
        "with alone(pathlib.Path(sys.argv[1]) / 'builder', print):\n"
        "    os._exit(9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, "-c", die_in_the_lock, str(folder)], env=environment, check=False)
    assert died.returncode == 9
    cuda_build.extension()
    assert machine.builds == 1


def test_a_process_that_waited_takes_what_the_other_built(machine, monkeypatch):
    alone = cuda_build.alone

    def after_another(path, waits):
        (path.parent / "complete").touch()
        return alone(path, waits)

    monkeypatch.setattr(cuda_build, "alone", after_another)
    cuda_build.extension()
    assert machine.builds == 0


@pytest.mark.parametrize(("lack", "said"), [
    ({"CUDA_HOME": None}, "nvcc"),
    ({"CUDA_HOME": "/nowhere"}, "/nowhere"),
    ({"is_ninja_available": lambda: False}, "pip install ninja"),
])
def test_what_the_build_lacks_is_named_with_the_way_out(machine, lack, said):
    vars(machine).update(lack)
    with pytest.raises(UserError, match=said) as caught:
        cuda_build.extension()
    assert "--op triton" in str(caught.value)
    assert machine.builds == 0


def test_a_missing_compiler_a_missing_header_and_another_cuda_are_named(machine, monkeypatch):
    assert cuda_build.objection() == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA toolkit 12.8, but PyTorch is for CUDA 13.0" in cuda_build.objection()
    monkeypatch.setattr(cuda_build.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "Python.h" in cuda_build.objection()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not on PATH" in cuda_build.objection()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is without CUDA" in cuda_build.objection()


def test_a_failed_build_says_the_first_error_and_keeps_the_log(machine):
    log = "\n".join([
        "Error building extension 'x': [1/3] nvcc -DX --Werror=y -c kernel.cu",
        "FAILED: [code=1] kernel.o", "nvcc -c kernel.cu", "kernel.cu(7): error: identifier \"q\" is undefined",
        "kernel.cu(9): error: expected a \";\"", "ninja: build stopped: subcommand failed.",
    ])

    def load(**_):
        raise RuntimeError(log)

    machine.load = load
    with pytest.raises(UserError) as caught:
        cuda_build.extension()
    kept = cuda_build.build_folder() / "build.log"
    assert "kernel.cu(7): error: identifier" in str(caught.value)
    assert str(kept) in str(caught.value)
    assert "--op torch" in str(caught.value)
    assert kept.read_text() == log
    assert not cuda_build.is_built()


def test_the_sources_that_are_named_exist():
    folder = cuda_build.sources_folder()
    assert all((folder / source).is_file() for source in cuda_build.SOURCES)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.c*") if path.suffix != ".cuh"} == set(
        cuda_build.SOURCES)


def test_no_two_sources_make_objects_of_the_same_name():
    assert len({Path(source).name for source in cuda_build.SOURCES}) == len(cuda_build.SOURCES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["80", "120"])
def test_every_kernel_compiles_without_spilling(architecture):
    script = str(ROOT / "scripts" / "compile_cuda.py")
    done = subprocess.run([sys.executable, script, "--archs", architecture], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("kernels, 0 spill")
