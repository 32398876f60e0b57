"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is declared: without a GPU its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

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
    parser.addoption("--kills", type=int, default=3, help="how often the kill -9 drill kills its run")
    parser.addoption("--support-report", help="write which adapter works on which base to this json file")
