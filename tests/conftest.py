"""Fixtures every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
