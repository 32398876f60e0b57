"""Data files that change, shrink or hang while the command trains on them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


@pytest.fixture
def own_data(binidx_prefix, tmp_path):
    """A pair of files that a test may spoil."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{binidx_prefix}{suffix}", f"{tmp_path}/data{suffix}")
    return tmp_path / "data"


def once_begun(folder, spoil):
    """Call ``spoil`` from another thread when the run has taken two more steps."""

    def steps():
        log = folder / "loss_data.jsonl"
        return log.read_bytes().count(b"\n") if log.is_file() else 0

    wanted = steps() + 2

    def wait():
        while steps() < wanted:
            time.sleep(0.002)
        spoil()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_shrinks_ends_the_run_and_leaves_its_resume_point(train, own_data, tmp_path, workers):
    content = Path(f"{own_data}.bin").read_bytes()
    once_begun(tmp_path / "out", lambda: os.truncate(f"{own_data}.bin", 20))
    words = ("--data_file", own_data, "--peft", "state", "--save_steps", 1, "--epoch_steps", 5000)
    code, _, errors = train(*words, "--num_workers", workers)
    assert code == 2
    assert "error: step " in errors
    assert f"the data file changed while the run was reading it: {own_data}.bin" in errors
    assert list((tmp_path / "out/resume").glob("step-*"))
    Path(f"{own_data}.bin").write_bytes(content)
    once_begun(tmp_path / "out", lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, output, errors = train(*words)
    assert code == 0, errors
    assert "going on from" in output


def test_a_file_put_in_its_place_is_told_of_and_does_not_disturb(train, own_data, tmp_path):
    def replace():
        Path(f"{tmp_path}/other").write_bytes(b"others")
        os.replace(f"{tmp_path}/other", f"{own_data}.bin")

    once_begun(tmp_path / "out", replace)
    code, output, errors = train("--data_file", own_data, "--peft", "state", "--epoch_steps", 20, "--epoch_count", 3)
    assert code == 0, errors
    assert output.count(f"warning: {own_data}.bin is another file now") == 1


def test_a_read_that_hangs_ends_the_run_after_the_time_out(tiny_model, own_data, tmp_path):
    words = (
        f"--load_model {tiny_model} --data_file {own_data} --proj_dir {tmp_path}/out --accelerator cpu --peft state "
        "--ctx_len 16 --micro_bsz 1 --epoch_steps 100000 --epoch_count 1 --num_workers 1 --read_timeout 4"
    )
    command = [sys.executable, "-u", "train.py", *words.split()]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as run:
        for line in run.stdout:
            if line.startswith("step"):
                break
        [worker] = children(run.pid)
        # as a process does that reads from a file system which is gone
        os.kill(worker, signal.SIGSTOP)
        rest = run.stdout.read()
    assert run.returncode == 2, rest
    assert f"waiting for data from {own_data} since" in rest
    assert f"error: no data from {own_data} for" in rest
    assert has_ended(worker)


def has_ended(process):
    """Whether a process is gone, or is kept as an entry only, by a parent that never asks for its exit code."""
    status = Path(f"/proc/{process}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def children(process):
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
