"""Fixtures every test may use."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch


def _release(package: str) -> tuple[int, ...]:
    """The first two numbers of the installed version; nothing if there is none."""
    try:
        return tuple(int(number) for number in version(package).split(".")[:2])
    except PackageNotFoundError:
        return ()


if not torch.cuda.is_available():
    # Triton reads this when a kernel is declared: without a GPU its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        # that interpreter takes no index from such an array: its kernels are not tested, as where there is no Triton
        sys.modules["triton"] = None  # type: ignore[assignment]

# tests use tiny tensors: a second thread costs more than it brings
torch.set_num_threads(1)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference data; a test that asks for it is skipped on a machine without the folder."""
    if not GOLDEN.is_dir():
        pytest.skip(f"reference data not found at {GOLDEN}")
    return GOLDEN


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=8, help="how often tests/faults kills its runs, over all strategies")
    parser.addoption("--support-report", help="write which adapter works on which base to this json file")
