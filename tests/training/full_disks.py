"""Disks without room, in ways that need no rights."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager

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
