"""Runs of several real processes on a tiny model: how they are started, watched, and ended without mercy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_", "RWKVPEFT_")
PATIENCE = 120


@pytest.fixture(scope="session")
def base_words(tmp_path_factory):
    """Words of a command line: a random model of two layers, a few documents, steps on a CPU."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = new_shape("x070", n_layer=2, n_embd=32, vocab_size=256, head_size=16)
    torch.save(Rwkv7.initial_weights(shape), folder / "tiny.pth")
    texts = [f"User: what is {number} and {number}?\n\nAssistant: {2 * number}." for number in range(12)]
    write_binidx(
        folder / "data", (np.frombuffer(text.encode() + b"\0", dtype=np.uint8).astype(np.uint16) for text in texts)
    )
    words = f"--load_model {folder}/tiny.pth --data_file {folder}/data --accelerator cpu --tokenizer bytes"
    run = "--ctx_len 48 --micro_bsz 2 --epoch_count 1 --epoch_save 1 --lr_init 1e-3 --lr_final 1e-3 --report false"
    return [*words.split(), *run.split()]


class Run:
    """A run of several processes that was started by one command, in a session of its own."""

    def __init__(self, command, folder, env):
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def output(self):
        return self.log.read_text(errors="replace")

    def trainers(self):
        """Ids of the processes that train, by LOCAL_RANK, as far as they are there."""
        found = {}
        for place in Path("/proc").iterdir():
            if place.name.isdigit() and alive(int(place.name)):
                try:
                    words = (place / "cmdline").read_bytes().split(b"\0")
                    variables = (place / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"--proj_dir" in words and str(self.folder).encode() in words and _trains(words):
                    local = [item[11:] for item in variables if item.startswith(b"LOCAL_RANK=")]
                    found[int(local[0]) if local else 0] = int(place.name)
        return found

    def wait_until_saved(self, processes):
        """Wait for the first resume point. Returns the ids of the processes that train, by LOCAL_RANK."""
        until = time.monotonic() + PATIENCE
        while not list(self.folder.glob("resume/step-*/resume.json")):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < until, self.output()
            time.sleep(0.1)
        found = self.trainers()
        assert processes is None or len(found) == processes, (found, self.output())
        return found

    def end(self):
        """Leave nothing behind, stopped processes included."""
        for process in [*self.trainers().values(), self.process.pid]:
            if process == self.process.pid and self.process.poll() is not None:
                continue
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def _trains(words):
    # torchrun and DeepSpeed carry the words of train.py too, behind its name
    program = words[2:3] if words[1:2] == [b"-u"] else words[1:2]
    return program == [str(ROOT / "train.py").encode()]


def alive(process):
    """Whether the process exists and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


class Drill:
    """Starts runs and ends them; what is left of them at the end of a test is killed."""

    def __init__(self):
        self._runs = []

    def start(self, command, folder, env=None):
        """Start a run whose ``--proj_dir`` is ``folder``."""
        self._runs.append(Run([str(word) for word in command], folder, env or self.environment()))
        return self._runs[-1]

    def finish(self, runs):
        """Wait until all of ``runs`` have ended well."""
        for run in runs:
            assert run.process.wait(PATIENCE) == 0, run.output()

    def end_all(self):
        for run in self._runs:
            run.end()

    @staticmethod
    def train(*words):
        """The command of one process, or of the first one of a machine."""
        return [sys.executable, str(ROOT / "train.py"), *words]

    @staticmethod
    def torchrun(*options):
        """The command of torchrun with its options, to which train.py's words are added."""
        return [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py")]

    @staticmethod
    def environment(**more):
        """The environment without anything a launcher has set; each process computes in one thread."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        return {**kept, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in more.items()}}

    @staticmethod
    def free_port():
        with socket.create_server(("127.0.0.1", 0)) as server:
            return server.getsockname()[1]

    @staticmethod
    def seconds_until_gone(processes, limit):
        """How long it takes until none of the processes is there any more; fails after ``limit`` seconds."""
        begin = time.monotonic()
        while any(alive(process) for process in processes):
            assert time.monotonic() - begin < limit, f"still there after {limit} s: {processes}"
            time.sleep(0.05)
        return time.monotonic() - begin

    @staticmethod
    def weights(folder):
        """The tensors of the last checkpoint."""
        return torch.load(folder / "rwkv-0.pth", weights_only=True)


@pytest.fixture
def drill():
    drill = Drill()
    yield drill
    drill.end_all()
