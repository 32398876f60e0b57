"""Runs that are asked to end, by people and by schedulers, alone and together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
GRACE_SECONDS = 20

pytestmark = pytest.mark.slow


@pytest.fixture
def begin(tiny_model, binidx_prefix, tmp_path):
    """Start the command for far too many steps, in a process group of its own; wait for a line that begins so."""
    runs = []

    def start(*words, until="step"):
        common = f"--load_model {tiny_model} --data_file {binidx_prefix} --proj_dir {tmp_path} --accelerator cpu"
        short = "--ctx_len 16 --micro_bsz 1 --epoch_steps 100000 --epoch_count 1 --peft state"
        command = [sys.executable, "-u", "train.py", *common.split(), *short.split(), *words]
        run = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
        runs.append(run)
        for line in run.stdout:
            if line.startswith(until):
                return run
        pytest.fail(f"no line {until}: {run.wait()}")

    yield start
    for run in runs:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()
        run.wait()


def ending(run):
    """What the run says until it ends, its exit code, and the seconds that took."""
    began = time.monotonic()
    rest, _ = run.communicate(timeout=120)
    return rest, run.returncode, time.monotonic() - began


def to_all(run, number):
    os.killpg(run.pid, number)


def to_the_first(run, number):
    run.send_signal(number)


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGTERM, to_all),
        (signal.SIGUSR1, to_the_first),
        pytest.param(signal.SIGTERM, to_the_first, marks=pytest.mark.faults),
        pytest.param(signal.SIGUSR1, to_all, marks=pytest.mark.faults),
    ],
)
def test_a_scheduler_may_signal_the_process_or_all_of_its_group(begin, tmp_path, number, send):
    run = begin("--num_workers", "1")
    send(run, number)
    # timeout(1) signals the process and then its group
    to_the_first(run, number)
    rest, code, seconds = ending(run)
    assert code == 0, rest
    assert "the same command goes on from" in rest
    assert list((tmp_path / "resume").glob("step-*/resume.json"))
    assert seconds < GRACE_SECONDS


@pytest.mark.parametrize("send", [pytest.param(to_the_first, marks=pytest.mark.faults), to_all])
def test_of_two_processes_either_may_be_told_to_end(begin, tmp_path, send):
    run = begin("--devices", "2", "--strategy", "ddp")
    send(run, signal.SIGTERM)
    rest, code, seconds = ending(run)
    assert code == 0, rest
    assert "Traceback" not in rest
    assert list((tmp_path / "resume").glob("step-*/resume.json"))
    assert seconds < GRACE_SECONDS


def test_ctrl_c_twice_ends_at_once_and_leaves_no_half_file(begin, tmp_path):
    # a resume point after every step: most of the time is spent in writing
    run = begin("--save_steps", "1", "--num_workers", "1")
    to_all(run, signal.SIGINT)
    time.sleep(0.3)
    to_all(run, signal.SIGINT)
    rest, code, seconds = ending(run)
    # the first one may already have ended the run well
    assert code in (0, 130), rest
    assert "Traceback" not in rest
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    assert seconds < GRACE_SECONDS


def test_ctrl_c_twice_within_a_long_step_ends_with_130(begin):
    run = begin("--accumulate_grad_batches", "100000", until="output:")
    # one step, which is all of the mini-epoch
    time.sleep(5)
    to_all(run, signal.SIGINT)
    time.sleep(0.5)
    to_all(run, signal.SIGINT)
    rest, code, seconds = ending(run)
    assert code == 130, rest
    assert "Traceback" not in rest
    assert seconds < GRACE_SECONDS


def test_ctrl_c_before_the_first_step_ends_with_130(begin):
    run = begin(until="random seed")
    to_all(run, signal.SIGINT)
    rest, code, _ = ending(run)
    # where training has begun in the meantime, the run ends after its first step
    assert code in (0, 130), rest
    assert "Traceback" not in rest
