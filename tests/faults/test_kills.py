"""A few kills under each kind of strategy; ``kills.py`` deals hundreds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STRATEGIES = "auto deepspeed_stage_2 deepspeed_stage_3_offload fsdp"


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("processes", [1, 2])
def test_runs_that_are_killed_end_like_runs_left_alone(processes, request):
    pytest.importorskip("deepspeed")
    program = Path(__file__).with_name("kills.py")
    words = f"--kills {request.config.getoption('--kills')} --processes {processes} --strategies {STRATEGIES}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), *words.split()], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
