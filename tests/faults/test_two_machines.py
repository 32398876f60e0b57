"""Two machines, made of two network namespaces joined by a cable: they train together, and one is cut off."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29500
PEER_LOST = 75


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


def _may_make_networks():
    if sys.platform != "linux" or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    cable = "ip link add end0 type veth peer name end1"
    return subprocess.run(["unshare", "-n", *cable.split()], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(not _may_make_networks(), reason="needs ip, unshare and CAP_NET_ADMIN"),
]


@pytest.fixture
def machines():
    """Names of two network namespaces with a cable between them; each has loopback and one interface."""
    names = [f"rwkv{os.getpid() % 10000}{letter}" for letter in "ab"]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        cable = [f"{name}v" for name in names]
        ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
        for name, end, address in zip(names, cable, ADDRESSES, strict=True):
            for words in (["addr", "add", f"{address}/24", "dev", end], ["link", "set", end, "up"],
                          ["link", "set", "lo", "up"]):
                ip("-n", name, *words)
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


@pytest.fixture
def together(drill, base_words, machines, tmp_path):
    """Start one run on both machines. Returns a run for each; they share one ``--proj_dir``."""

    def begin(how, *words):
        folder = tmp_path / "out"
        rest = [*base_words, "--proj_dir", folder, "--random_seed", 3, *words]
        runs = []
        for number, name in enumerate(machines):
            more = {"GLOO_SOCKET_IFNAME": f"{name}v"}
            if how == "torchrun":
                place = ("--master_addr", ADDRESSES[0], "--master_port", PORT)
                options = ("--nnodes", 2, "--node_rank", number, "--nproc_per_node", 1, *place)
                command = [*drill.torchrun(*options), *rest]
            else:
                more |= {"NODE_RANK": number, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT}
                command = [*drill.train(), *rest, "--num_nodes", 2]
            command = ["ip", "netns", "exec", name, *command]
            log = tmp_path / f"machine{number}"
            runs.append(drill.start(command, log, drill.environment(**more)))
            runs[-1].folder = folder
        return runs

    return begin


@pytest.mark.parametrize("how", ["torchrun", "variables"])
def test_two_machines_give_what_two_processes_of_one_give(drill, together, base_words, tmp_path, how):
    alone = tmp_path / "alone"
    short = ("--epoch_steps", 6, "--random_seed", 3)
    one = drill.start([*drill.train(*base_words), *short, "--devices", 2, "--proj_dir", alone], alone)
    drill.finish([one])
    runs = together(how, *short)
    drill.finish(runs)
    assert runs[0].output().count("done after step 6") == 1
    assert "done after" not in runs[1].output()
    weights = drill.weights(tmp_path / "out")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in drill.weights(alone).items())


def test_a_machine_is_cut_off_and_each_says_so(drill, together, machines):
    runs = together("variables", "--epoch_steps", 100000, "--save_steps", 10, "--peer_timeout", 10)
    runs[0].wait_until_saved(None)
    ip("-n", machines[1], "link", "set", f"{machines[1]}v", "down")
    seconds = [drill.seconds_until_gone([run.process.pid], 60) for run in runs]
    print(f"cut off, --peer_timeout 10: the machines ended after {seconds[0]:.1f} s and {sum(seconds):.1f} s")
    for run, other in zip(runs, (1, 0), strict=True):
        assert run.process.wait() == PEER_LOST
        assert f"error: process {other} of 2 (pid " in run.output()
        assert "has not been heard of for 10 s" in run.output()
        assert "the same command goes on from step " in run.output()


def test_a_machine_with_another_resume_point_is_refused(drill, base_words, machines, tmp_path):
    words = [*base_words, "--random_seed", 3, "--save_steps", 2, "--epoch_steps", 100000]
    # an earlier part of the run, by which machine 0 alone has a resume point
    earlier = drill.start([*drill.train(), *words, "--devices", 2, "--proj_dir", tmp_path / "own0"], tmp_path / "own0")
    os.kill(earlier.wait_until_saved(2)[0], signal.SIGTERM)
    drill.finish([earlier])
    runs = []
    for number, name in enumerate(machines):
        place = {"NODE_RANK": number, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT}
        env = drill.environment(GLOO_SOCKET_IFNAME=f"{name}v", **place)
        own = ["--proj_dir", tmp_path / f"own{number}", "--num_nodes", 2]
        command = ["ip", "netns", "exec", name, *drill.train(), *words, *own]
        runs.append(drill.start(command, tmp_path / f"machine{number}", env))
    codes = [run.process.wait(90) for run in runs]
    assert codes[1] == 2, [run.output() for run in runs]
    assert "finds other files than the first one" in runs[1].output()
    assert "resume point None" in runs[1].output()
    assert codes[0] == PEER_LOST
    assert "process 1 of 2" in runs[0].output()
    assert "finds other files than the first one" in runs[0].output()
