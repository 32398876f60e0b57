"""What launchers set in the environment, and what it says about a run's processes."""

from __future__ import annotations

import pytest

from rwkvpeft.config.launcher import STARTED_BY_US, read_launch
from rwkvpeft.errors import UserError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SLURM = {
    "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_JOB_NAME": "train",
}
DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
VARIABLES = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
BY_HAND = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("environ", "devices"), [(TORCHRUN, None), (SLURM, None), (DEEPSPEED, None), (VARIABLES, 2)])
def test_a_launcher_tells_which_process_this_is(environ, devices):
    launch = read_launch(environ, devices, None)
    assert (launch.rank, launch.local_rank, launch.node_rank) == (3, 1, 1)
    assert (launch.devices, launch.num_nodes) == (2, 2)
    assert not launch.starts_others


def test_without_a_launcher_the_first_process_starts_the_others():
    launch = read_launch({}, 4, None)
    assert launch.starts_others
    assert launch.leads
    other = read_launch({STARTED_BY_US: "17", "LOCAL_RANK": "3"}, 4, None)
    assert (other.rank, other.starts_others) == (3, False)


def test_a_machine_that_is_started_by_hand_has_its_number_in_the_environment():
    launch = read_launch(BY_HAND, 4, 2)
    assert (launch.rank, launch.leads_machine, launch.leads, launch.starts_others) == (4, True, False, True)


@pytest.mark.parametrize("missing", list(BY_HAND))
def test_machines_that_cannot_find_each_other_are_told_how(missing):
    with pytest.raises(UserError, match="which machine this is") as caught:
        read_launch({name: value for name, value in BY_HAND.items() if name != missing}, 1, 2)
    assert missing in caught.value.found


@pytest.mark.parametrize("environ", [TORCHRUN, SLURM, DEEPSPEED])
@pytest.mark.parametrize(("devices", "num_nodes"), [(4, None), (None, 1), (4, 1)])
def test_flags_that_contradict_a_launcher_are_refused_with_the_right_ones(environ, devices, num_nodes):
    with pytest.raises(UserError, match="started the processes otherwise") as caught:
        read_launch(environ, devices, num_nodes)
    assert "--devices 2 --num_nodes 2" in caught.value.fix


def test_machines_of_different_size_are_refused():
    with pytest.raises(UserError, match="as many processes on each machine"):
        read_launch({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, None, None)


def test_slurm_without_srun_or_tasks_per_node_is_refused_with_what_to_write():
    with pytest.raises(UserError, match="how many processes") as caught:
        read_launch({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None, None)
    assert "--ntasks-per-node" in caught.value.fix
    with pytest.raises(UserError, match="not started by srun"):
        read_launch({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}, None, None)


def test_slurm_at_an_interactive_shell_starts_nothing():
    assert read_launch({**SLURM, "SLURM_JOB_NAME": "bash"}, 2, None).starts_others


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(UserError, match="WORLD_SIZE"):
        read_launch({**TORCHRUN, "WORLD_SIZE": "many"}, None, None)
