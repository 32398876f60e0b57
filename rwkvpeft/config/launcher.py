"""Which of a run's processes this one is, as the program that started it says in the environment.

torchrun, SLURM's srun and DeepSpeed's launcher start every process themselves; ``python train.py`` starts the others of
its machine. Nothing heavy is imported here, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rwkvpeft.errors import UserError

STARTED_BY_US = "RWKVPEFT_STARTED_BY"
"""Set for the processes that the first one of a machine starts: that one's process id."""

_INTERACTIVE = ("bash", "interactive")


@dataclass(frozen=True)
class Launch:
    """This process's place among those that train together.

    Attributes:
        by: what started the processes; empty where ``python train.py`` starts those of its machine itself.
        rank: of this process among all, machine by machine; 0 leads.
        local_rank: of this process on its machine.
        devices: processes on each machine.
        num_nodes: machines.
        watches_parent: whether the end of the process that started this one is to end it too.
    """

    by: str = ""
    rank: int = 0
    local_rank: int = 0
    devices: int = 1
    num_nodes: int = 1
    watches_parent: bool = False

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes

    @property
    def node_rank(self) -> int:
        """This machine's number."""
        return self.rank // self.devices

    @property
    def leads(self) -> bool:
        """Whether this process decides, prints and writes for all."""
        return self.rank == 0

    @property
    def leads_machine(self) -> bool:
        """Whether this process is the first of its machine."""
        return self.local_rank == 0

    @property
    def starts_others(self) -> bool:
        """Whether this process has to start the others of its machine."""
        return not self.by and self.devices > 1


def read_launch(environ: Mapping[str, str], devices: int | None, num_nodes: int | None) -> Launch:
    """This process's place, from what launchers set and the flags say.

    Args:
        devices: of ``--devices``; None if it is not given, likewise ``num_nodes``.
    Raises: UserError if flags and launcher contradict each other, or the launcher's variables are incomplete.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        local = _number(environ, "LOCAL_WORLD_SIZE")
        found = _started("torchrun", environ, local, "LOCAL_RANK")
    elif _is_slurm(environ):
        found = _slurm(environ)
    elif "LOCAL_SIZE" in environ and "CROSS_RANK" in environ and "RANK" in environ:
        found = _started("DeepSpeed's launcher", environ, _number(environ, "LOCAL_SIZE"), "LOCAL_RANK")
    elif all(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        world = _number(environ, "WORLD_SIZE")
        found = _started("the environment", environ, devices or max(1, world // (num_nodes or 1)), "LOCAL_RANK")
    else:
        return _own(environ, devices or 1, num_nodes or 1)
    _compare(found, devices, num_nodes)
    return found


def _started(by: str, environ: Mapping[str, str], devices: int, local_rank: str) -> Launch:
    world = _number(environ, "WORLD_SIZE")
    rank, local = _number(environ, "RANK"), _number(environ, local_rank)
    if devices < 1 or world % devices or not 0 <= rank < world or rank % devices != local:
        raise UserError(
            f"{by} did not start as many processes on each machine",
            found=f"process {rank} of {world}, on its machine {local} of {devices}",
            expected="the same number on every machine, counted machine by machine",
        )
    return Launch(by, rank, local, devices, world // devices, watches_parent=by != "the environment")


def _is_slurm(environ: Mapping[str, str]) -> bool:
    # as Lightning tells it, which sets up the processes' connection
    return "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in _INTERACTIVE


def _slurm(environ: Mapping[str, str]) -> Launch:
    world = _number(environ, "SLURM_NTASKS")
    if world == 1:
        return Launch("SLURM")
    if "SLURM_NTASKS_PER_NODE" not in environ:
        raise UserError(
            "SLURM does not say how many processes a machine has",
            found=f"--ntasks {world}",
            fix="#SBATCH --ntasks-per-node=N, with N devices on each machine",
        )
    devices = _number(environ, "SLURM_NTASKS_PER_NODE")
    numbers = {"WORLD_SIZE": "SLURM_NTASKS", "RANK": "SLURM_PROCID", "SLURM_LOCALID": "SLURM_LOCALID"}
    for name in numbers.values():
        if name not in environ:
            raise UserError(f"{name} is not set: the processes were not started by srun", fix="srun python train.py")
    launch = _started("SLURM", {ours: environ[theirs] for ours, theirs in numbers.items()}, devices, "SLURM_LOCALID")
    # SLURM ends the processes of a job itself
    return Launch("SLURM", launch.rank, launch.local_rank, devices, launch.num_nodes)


def _own(environ: Mapping[str, str], devices: int, num_nodes: int) -> Launch:
    """A process started by hand on each machine, or one that such a process has started."""
    ours = STARTED_BY_US in environ
    by_hand = "LOCAL_RANK" in environ and not ours
    local = _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else 0
    node = _number(environ, "NODE_RANK") if num_nodes > 1 and "NODE_RANK" in environ else 0
    if num_nodes > 1:
        missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise UserError(
                f"--num_nodes {num_nodes}: the environment does not say which machine this is and where the first is",
                found=f"no {', '.join(missing)}",
                expected="NODE_RANK=0, 1, ... and the first machine's address and a free port of it, on each machine",
                fix="NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 python train.py ..., or torchrun, or srun",
            )
    if not 0 <= node < max(num_nodes, 1) or not 0 <= local < max(devices, 1):
        raise UserError(
            "the environment numbers more processes than the flags name",
            found=f"NODE_RANK {node} of --num_nodes {num_nodes}, LOCAL_RANK {local} of --devices {devices}",
            fix="--devices and --num_nodes as they are, or unset LOCAL_RANK NODE_RANK",
        )
    by = "python train.py" if ours else "the environment" if by_hand else ""
    # mistakes in the numbers are told with those in the other flags
    return Launch(by, node * max(devices, 1) + local, local, max(devices, 1), max(num_nodes, 1), watches_parent=ours)


def _compare(found: Launch, devices: int | None, num_nodes: int | None) -> None:
    """Raises: UserError if a flag that is given says something else than the launcher."""
    wrong = [
        f"--{name} {given}"
        for name, given, there in (("devices", devices, found.devices), ("num_nodes", num_nodes, found.num_nodes))
        if given is not None and given != there
    ]
    if not wrong:
        return
    asked, machines = devices or found.devices, num_nodes or found.num_nodes
    more = {
        "torchrun": f", or torchrun --nproc_per_node {asked} --nnodes {machines}",
        "SLURM": f", or #SBATCH --ntasks-per-node={asked} --nodes={machines}",
    }.get(found.by, "")
    raise UserError(
        f"{' '.join(wrong)}: {found.by} started the processes otherwise",
        found=f"{found.world_size} processes, {found.devices} on each of {found.num_nodes} machines",
        fix=f"--devices {found.devices} --num_nodes {found.num_nodes}{more}",
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    # SLURM writes 4(x2) for two machines of four
    digits = text.partition("(")[0]
    if not digits.isdecimal():
        raise UserError(f"the environment's {name} is no number", found=text or "nothing")
    return int(digits)
