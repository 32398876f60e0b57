"""One process of a run dies or is stopped: the others end within a minute and say why, and nothing is left over."""

from __future__ import annotations

import os
import signal
import sys

import pytest

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

ENDLESS = ("--epoch_steps", "100000", "--save_steps", "10", "--random_seed", "1")
PEER_LOST = 75


@pytest.fixture
def pair(drill, base_words, tmp_path):
    """Two processes of one machine in training. Returns the run and their ids by LOCAL_RANK."""

    def begin(*words):
        folder = tmp_path / "out"
        run = drill.start([*drill.train(*base_words), *ENDLESS, "--devices", 2, "--proj_dir", folder, *words], folder)
        return run, run.wait_until_saved(2)

    return begin


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_is_killed_and_the_other_ends_with_the_cause(pair, drill, victim):
    run, processes = pair()
    os.kill(processes[victim], signal.SIGKILL)
    seconds = drill.seconds_until_gone(processes.values(), 15)
    print(f"process {victim} killed: the other ended after {seconds:.2f} s")
    assert f"error: process {victim} of 2 (pid {processes[victim]} on " in run.output()
    assert "killed" in run.output()
    assert "the same command goes on from step " in run.output()
    assert "Traceback" not in run.output()
    if victim == 1:
        assert run.process.wait() == PEER_LOST


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_is_stopped_and_the_other_ends_with_the_cause(pair, drill, victim):
    run, processes = pair("--peer_timeout", 8)
    os.kill(processes[victim], signal.SIGSTOP)
    seconds = drill.seconds_until_gone(processes.values(), 30)
    print(f"process {victim} stopped, --peer_timeout 8: all ended after {seconds:.2f} s")
    assert f"error: process {victim} of 2 (pid {processes[victim]} on " in run.output()
    assert "has not been heard of for 8 s" in run.output()


def test_both_are_stopped_for_longer_and_go_on(pair, drill):
    run, processes = pair("--peer_timeout", 5)
    for process in processes.values():
        os.kill(process, signal.SIGSTOP)
    with pytest.raises(AssertionError, match="still there"):
        drill.seconds_until_gone(processes.values(), 8)
    for process in processes.values():
        os.kill(process, signal.SIGCONT)
    with pytest.raises(AssertionError, match="still there"):
        drill.seconds_until_gone(processes.values(), 8)
    assert "error" not in run.output()


def test_torchrun_is_killed_and_its_processes_end(drill, base_words, tmp_path):
    folder = tmp_path / "out"
    launcher = drill.torchrun("--nproc_per_node", 2, "--master_port", drill.free_port())
    run = drill.start([*launcher, *base_words, *ENDLESS, "--proj_dir", folder], folder)
    processes = run.wait_until_saved(2)
    run.process.kill()
    seconds = drill.seconds_until_gone(processes.values(), 15)
    print(f"torchrun killed: its processes ended after {seconds:.2f} s")
    assert "has lost the process that started it" in run.output()


@pytest.mark.parametrize("target", ["first", "all"])
def test_sigterm_saves_and_is_no_false_alarm(pair, drill, target):
    run, processes = pair()
    for process in processes.values() if target == "all" else [processes[0]]:
        os.kill(process, signal.SIGTERM)
    drill.seconds_until_gone(processes.values(), 30)
    assert run.process.wait() == 0, run.output()
    assert "error" not in run.output()
    assert "the same command goes on from" in run.output()


def test_a_mistake_of_one_process_is_told_once(drill, base_words, tmp_path):
    folder = tmp_path / "out"
    port = drill.free_port()
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = []
    for rank, rate in ((0, "1e-3"), (1, "2e-3")):
        env = drill.environment(RANK=rank, LOCAL_RANK=rank, **place)
        words = [*ENDLESS, "--proj_dir", folder, "--devices", 2, "--lr_init", rate]
        runs.append(drill.start([*drill.train(*base_words), *words], tmp_path / f"rank{rank}", env))
    codes = [run.process.wait(60) for run in runs]
    assert codes == [PEER_LOST, 2], [run.output() for run in runs]
    assert "was started with other settings than the first one" in runs[1].output()
    assert "--lr_init 0.002" in runs[1].output()
    assert "error" not in runs[0].output()
