"""The script that measures everything on a GPU, in miniature."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def gpu_check(out, *words):
    command = [sys.executable, ROOT / "scripts" / "gpu_check.py", "--small", "--out", out, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_stage_comes_to_its_end_and_the_results_are_right(tmp_path):
    pytest.importorskip("triton")
    done = gpu_check(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stdout
    assert {stage["status"] for stage in results["stages"].values()} == {"done"}
    verdicts = [row["verdict"] for name, stage in results["stages"].items() if name.startswith("errors")
                for row in stage["record"]["rows"]]
    assert len(verdicts) == 18
    assert set(verdicts) == {"right"}
    assert "wkv7 triton: 3 of 3 inputs right" in (tmp_path / "table.txt").read_text()


@pytest.mark.slow
def test_a_stage_that_takes_too_long_is_recorded_and_those_behind_it_have_no_time(tmp_path):
    done = gpu_check(tmp_path, "--seconds", 2, "--only", "times wkv7", "block")
    results = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 1
    assert [stage["status"] for stage in results["stages"].values()] == ["out of time", "no time left"]
