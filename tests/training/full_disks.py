"""Disks without room."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def limited_file_size(size: int) -> Generator[None, None, None]:
    """Inside the block no file of this process can grow beyond ``size`` bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Generator[Path, None, None]:
    """Inside the block ``path`` is a file system of that size, of its own; skips the test where none can be mounted."""
    path.mkdir()
    if mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)):
        pytest.skip("no file system can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextmanager
def read_only(path: Path) -> Generator[None, None, None]:
    """Inside the block nothing can be opened for writing in the folder ``path``; skips where that cannot be done."""
    if mount("--bind", str(path), str(path)):
        pytest.skip("no file system can be mounted here")
    try:
        assert mount("-o", "remount,bind,ro", str(path)) == 0
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def mount(*words: str) -> int:
    """Call mount(8). Returns its exit code."""
    if shutil.which("mount") is None:
        return 1
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode
