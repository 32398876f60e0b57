"""Whatever starts the processes, the run is the same."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

SHORT = ("--epoch_steps", "6", "--random_seed", "3")


@pytest.fixture
def launched(drill, base_words, tmp_path):
    """Start a short run in one of several ways, wait for its end, and return its output and weights."""

    def by_hand(name, folder, words, variables):
        runs = []
        for rank in range(2):
            env = drill.environment(MASTER_ADDR="127.0.0.1", **{key: value(rank) for key, value in variables.items()})
            command = [*drill.train(*base_words), *SHORT, "--proj_dir", folder, *words]
            runs.append(drill.start(command, tmp_path / f"{name}{rank}", env))
        return runs

    def launch(name, *words):
        folder, port = tmp_path / name, drill.free_port()
        rest = [*base_words, *SHORT, "--proj_dir", folder, *words]
        if name == "ours":
            runs = [drill.start([*drill.train(), *rest, "--devices", 2], folder)]
        elif name == "torchrun":
            options = ("--nproc_per_node", 2, "--master_port", port)
            runs = [drill.start([*drill.torchrun(*options), *rest], folder)]
        elif name == "DeepSpeed":
            program = Path(sys.executable).parent / "deepspeed"
            options = ("--num_gpus", 2, "--master_port", port, drill.train()[1])
            env = drill.environment()
            env["PATH"] = f"{program.parent}:{env['PATH']}"
            runs = [drill.start([sys.executable, program, *options, *rest], folder, env)]
        elif name == "SLURM":
            numbers = {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2, "SLURM_NNODES": 1, "SLURM_NODEID": 0}
            own = ("SLURM_PROCID", "SLURM_LOCALID")
            variables = {key: lambda rank, value=value: value for key, value in numbers.items()}
            variables |= {key: lambda rank: rank for key in own}
            variables |= {"SLURM_JOB_ID": lambda rank: 100 + port % 9000, "SLURM_JOB_NAME": lambda rank: "train"}
            runs = by_hand(name, folder, words, variables)
        else:
            variables = {"RANK": lambda rank: rank, "LOCAL_RANK": lambda rank: rank, "WORLD_SIZE": lambda rank: 2}
            runs = by_hand(name, folder, words, {**variables, "MASTER_PORT": lambda rank: port})
        drill.finish(runs)
        return "".join(run.output() for run in runs), drill.weights(folder)

    return launch


@pytest.fixture
def wanted(launched):
    return launched("ours")[1]


@pytest.mark.parametrize("name", ["torchrun", "SLURM", "variables", "DeepSpeed"])
def test_every_launcher_gives_the_same_weights_as_one_command(launched, wanted, name):
    if name == "DeepSpeed" and not shutil.which("deepspeed", path=Path(sys.executable).parent):
        pytest.skip("DeepSpeed is not installed")
    output, weights = launched(name)
    assert "--devices 2: so " in output
    assert output.count("done after step 6") == 1
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in weights.items())


def test_one_process_draws_the_initial_weights_and_a_seed_for_all(drill, base_words, tmp_path):
    folder = tmp_path / "out"
    sizes = ["--my_testing", "x070", "--n_layer", 2, "--n_embd", 32, "--head_size_a", 16, "--load_model", 0]
    launcher = drill.torchrun("--nproc_per_node", 2, "--master_port", drill.free_port())
    run = drill.start([*launcher, *base_words, *sizes, "--epoch_steps", 2, "--proj_dir", folder], folder)
    drill.finish([run])
    assert run.output().count("drawing initial weights") == 1
    assert run.output().count("random seed") == 1


@pytest.mark.parametrize("words", [("--devices", 4), ("--num_nodes", 2)])
def test_flags_that_contradict_the_launcher_are_refused_before_anything_is_written(drill, base_words, tmp_path, words):
    folder = tmp_path / "out"
    launcher = drill.torchrun("--nproc_per_node", 2, "--master_port", drill.free_port())
    run = drill.start([*launcher, *base_words, *SHORT, "--proj_dir", folder, *words], folder)
    assert run.process.wait(60) != 0
    assert "torchrun started the processes otherwise" in run.output()
    assert "--devices 2 --num_nodes 1, or torchrun --nproc_per_node" in run.output()
    assert not folder.exists()
