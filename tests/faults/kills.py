"""Runs that are killed without warning at random moments, under every strategy, must end like runs left alone.

    python tests/faults/kills.py --kills 200

Each strategy trains a tiny model by one process and by two, once undisturbed, and then killed (SIGKILL to all of its
processes) and started again, over and over, until it is through. Half of the kills wait for a file being written, and
every other start writes beside the training (--save_async). After each kill every checkpoint seen before must still be
there and load, and no resume point may be lost; at the end the log must hold each step once, and all checkpoints must
be those of the undisturbed run: bit for bit with one process, to round-off with several.

Processes are forked from this one, which has imported everything: a start takes a tenth of a second, not five.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwkvpeft.cli.train import main as train
from rwkvpeft.config.groups import OutputConfig
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import STRATEGIES
from rwkvpeft.training import fit  # noqa: F401  what a run needs is imported once, here
from rwkvpeft.training.resume import find_point

ROUND_OFF = 1e-5
LONGEST = 120.0
KILLS_OF_A_RUN = 8
CHECKPOINTS = ("rwkv-0.pth", "rwkv-1.pth", "rwkv-2.pth")
BESIDE = ["--save_async", "--step_save", "3"]


class LostError(Exception):
    """Something that a kill must not destroy is gone, or a run ended otherwise than it should."""


@dataclass
class Job:
    """One strategy by so many processes, and what has become of it."""

    strategy: str
    processes: int
    kills: int = 0
    while_writing: int = 0
    runs: int = 0
    furthest: float = 0.0
    problems: list[str] = field(default_factory=list)

    def words(self, inputs: Path, folder: Path) -> list[str]:
        """The command line. Dropout is on: random numbers must come back too."""
        files = f"--load_model {inputs}/m.pth --data_file {inputs}/d --proj_dir {folder} --accelerator cpu"
        rows = f"--ctx_len 12 --micro_bsz {4 // self.processes} --accumulate_grad_batches 2"
        run = "--epoch_steps 16 --epoch_count 3 --epoch_save 1 --save_steps 2 --random_seed 7 --lr_init 1e-3"
        method = '--peft lora --peft_config {"r":4,"lora_dropout":0.1} --train_parts ln --report false --val_split 4'
        where = f"--devices {self.processes} --strategy {self.strategy}"
        return f"{files} {rows} {run} {method} {where}".split()

    def line(self) -> str:
        """For the table."""
        return (
            f"{self.strategy:26} {self.processes} proc. {self.kills:4} kills, {self.while_writing:3} while writing, "
            f"{self.runs:3} runs, furthest {self.furthest:.1e}"
            + "".join(f"\n  LOST: {problem}" for problem in self.problems)
        )


def make_inputs(folder: Path) -> None:
    """A tiny model and a few documents of different lengths."""
    torch.manual_seed(0)
    shape = new_shape("x070", n_layer=2, n_embd=32, vocab_size=64, head_size=16)
    torch.save(Rwkv7.initial_weights(shape), folder / "m.pth")
    write_binidx(folder / "d", (torch.randint(1, 64, (5 + n % 7,)).numpy().astype("uint16") for n in range(40)))


def start(job: Job, words: list[str], log: Path) -> list[int]:
    """Fork the processes of a run; returns their numbers."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    return [_fork(rank, job.processes, port, words, log) for rank in range(job.processes)]


def _fork(rank: int, processes: int, port: int, words: list[str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if processes > 1:
            _be_one_of(rank, processes, port)
        code = train(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be_one_of(rank: int, processes: int, port: int) -> None:
    """Stand where torchrun would have started this process."""
    from lightning_utilities.core.rank_zero import rank_zero_only

    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kills"}
    os.environ.update({name: str(value) for name, value in told.items()})
    rank_zero_only.rank = rank


def wait(pids: list[int], seconds: float) -> list[int] | None:
    """Exit codes of all processes; None if some still run after so long."""
    until = time.monotonic() + seconds
    while not all(map(_is_over, pids)):
        if time.monotonic() > until:
            return None
        time.sleep(0.002)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _is_over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(pids: list[int]) -> None:
    """SIGKILL to all, in any order."""
    for pid in random.sample(pids, len(pids)):
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def wait_for_writing(folder: Path, pids: list[int], seconds: float) -> bool:
    """Return when something is being written into ``folder``; False if that did not happen, or the run is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all(map(_is_over, pids)):
        if any(_partial(folder)):
            return True
        time.sleep(0.0005)
    return False


def _partial(folder: Path) -> Iterator[str]:
    for place in (folder, folder / "resume"):
        if place.is_dir():
            yield from (name for name in os.listdir(place) if ".partial-" in name)


class Watch:
    """What a folder has held so far, which no kill may take away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[str] = set()
        self._step = -1

    def look(self) -> None:
        """Raises: LostError."""
        there = {name for name in CHECKPOINTS if (self._folder / name).exists()}
        if self._seen - there:
            raise LostError(f"{sorted(self._seen - there)} are gone")
        for name in there:
            if not torch.load(self._folder / name, weights_only=True):
                raise LostError(f"{name} is empty")
        self._seen = there
        warnings: list[str] = []
        point = find_point(OutputConfig(proj_dir=str(self._folder)), warnings.append)
        step = -1 if point is None else point.progress.step
        if warnings or step < self._step:
            raise LostError(f"the resume point of step {self._step} is gone, {step} is left; {warnings}")
        self._step = step


def undisturbed(job: Job, inputs: Path, folder: Path) -> float:
    """Run it through; returns the seconds it took."""
    began, log = time.monotonic(), folder.with_suffix(".log")
    codes = wait(start(job, job.words(inputs, folder), log), LONGEST)
    if codes is None or any(codes):
        raise LostError(f"the undisturbed run ended with {codes}: {log.read_text()[-2000:]}")
    return time.monotonic() - began


def drill(job: Job, inputs: Path, calm: Path, folder: Path, seconds: float, most: int) -> None:
    """Kill a run again and again, at most ``most`` times, until it ends; then compare it with the calm one."""
    words, watch, log = job.words(inputs, folder), Watch(folder), folder.with_suffix(".log")
    job.runs += 1
    for start_number in range(most):
        # which first alternates too: some drills kill each run but once
        beside = BESIDE if (start_number + job.runs) % 2 else []
        codes = _start_and_kill(job, words + beside, log, folder, seconds)
        watch.look()
        if codes is not None:
            break
    else:
        codes = wait(start(job, words, log), LONGEST)
        watch.look()
    if codes is None or any(codes):
        raise LostError(f"ended with {codes}: {log.read_text()[-2000:]}")
    if steps_logged(folder) != steps_logged(calm):
        raise LostError(f"the log holds the steps {steps_logged(folder)}")
    job.furthest = max(job.furthest, furthest(calm, folder))
    if job.furthest > (0.0 if job.processes == 1 else ROUND_OFF):
        raise LostError(f"weights differ by {job.furthest:g}")


def _start_and_kill(job: Job, words: list[str], log: Path, folder: Path, seconds: float) -> list[int] | None:
    """Exit codes, if the run was over before it could be killed."""
    pids = start(job, words, log)
    writing = False
    if random.random() < 0.5:
        time.sleep(random.uniform(0, seconds / 2))
        writing = wait_for_writing(folder, pids, seconds)
        time.sleep(random.uniform(0, 0.01))
    else:
        wait_until = random.uniform(0, seconds)
        if (codes := wait(pids, wait_until)) is not None:
            return codes
    if all(map(_is_over, pids)):
        return wait(pids, 0)
    kill(pids)
    job.kills += 1
    job.while_writing += writing
    return None


def steps_logged(folder: Path) -> list[int]:
    """The numbers of the steps in a run's log, as they stand there."""
    return [json.loads(line)["step"] for line in (folder / "loss_data.jsonl").read_text().splitlines()]


def furthest(calm: Path, killed: Path) -> float:
    """The largest difference of a number in the checkpoints of two runs."""
    most = 0.0
    for name in CHECKPOINTS:
        left, right = (torch.load(folder / name, weights_only=True) for folder in (calm, killed))
        if left.keys() != right.keys():
            raise LostError(f"{name} holds other tensors")
        most = max(most, *((left[key].double() - right[key].double()).abs().max().item() for key in left))
    return most


def work(job: Job, place: Path, wanted: int) -> None:
    """Drill one strategy until so many kills have hit it."""
    calm = place / f"{job.strategy}-{job.processes}-calm"
    seconds = undisturbed(job, place, calm)
    while job.kills < wanted:
        folder = place / f"{job.strategy}-{job.processes}-{job.runs}"
        drill(job, place, calm, folder, seconds, min(KILLS_OF_A_RUN, wanted - job.kills))


def main() -> int:
    """Run the drills, print a table, and fail if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.set_num_threads(1)
    jobs = [Job(name, count) for name in arguments.strategies for count in arguments.processes]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_inputs(place)
        for job in jobs:
            try:
                work(job, place, -(-arguments.kills // len(jobs)))
            except LostError as problem:
                job.problems.append(str(problem))
            print(job.line(), flush=True)
    print(f"{sum(job.kills for job in jobs)} kills, {sum(len(job.problems) for job in jobs)} problems")
    return 1 if any(job.problems for job in jobs) else 0


if __name__ == "__main__":
    raise SystemExit(main())
