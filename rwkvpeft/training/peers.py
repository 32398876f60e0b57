"""The processes of one run as one: who goes first, what all must agree on, and one clear end when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import Callback
from torch.distributed import TCPStore

from rwkvpeft.config.groups import OutputConfig, TrainConfig
from rwkvpeft.config.launcher import STARTED_BY_US, Launch
from rwkvpeft.errors import UserError
from rwkvpeft.training.callbacks.steps import NoteSteps
from rwkvpeft.training.heartbeat import FirstHeart, Heart, OtherHeart, Verdict, unfinished
from rwkvpeft.training.point_order import newest_first
from rwkvpeft.training.resume import resume_folder

EXIT_PEER_LOST = 75
"""The exit code of a process that ends because another one has: EX_TEMPFAIL, the same command may go on."""

JOIN_SECONDS = 600.0
"""How long processes that others start, or people on several machines, may come after each other."""

_OUR_JOIN_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_POLL_SECONDS = 0.1
_EXIT_SIGTERM = 128 + signal.SIGTERM
_SHOWN_SETTINGS = 8
_LOST = ("closed by peer", "connection reset", "connection refused", "broken pipe", "gloo", "nccl", "timed out")
# paths, and what is a machine's own affair
_MAY_DIFFER = {
    "load_model", "data_file", "tokenizer", "adapter", "adapter_init", "layer_profile", "proj_dir", "resume",
    "val_data_file", "general_data_file", "sample_prompts", "debug", "num_workers", "persistent_workers",
    "prefetch_factor", "ds_config", "read_timeout", "random_seed",
}


class Peers:
    """The other processes of this run, while a ``with`` block lasts.

    Args:
        launch: which process this is, of several.
        output: where resume points are.
        timeout: seconds of silence after which a process counts as dead.
    Raises: UserError if the first process cannot be reached, or its port is taken.
    """

    def __init__(self, launch: Launch, output: OutputConfig, timeout: float) -> None:
        self.launch = launch
        self._output = output
        self._timeout = timeout
        self._heart: Heart | None = None
        self._store: TCPStore | None = None
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._environ: dict[str, str | None] = {}
        self._handler: Any = None
        self._terminated = False

    def __enter__(self) -> Peers:
        # what tells everywhere which process speaks and writes
        rank_zero_only.rank = self.launch.rank  # type: ignore[attr-defined]
        address, port = self._address()
        self._store = self._open_store(address, port)
        self._heart = self._open_heart(address)
        self._heart.start()
        if threading.current_thread() is threading.main_thread():
            # outside the training loop, which has its own: launchers send it to all when one process has died
            self._handler = signal.signal(signal.SIGTERM, partial(self._on_sigterm, os.getpid()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, reason: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._heart is None:
            return
        try:
            if reason is not None and (self._terminated or not isinstance(reason, UserError | KeyboardInterrupt)):
                self._explain(reason)
            self._heart.leave("" if reason is None else _first_line(reason))
            self._end_children(reason is not None)
        finally:
            self._heart = self._store = None
            if self._handler is not None:
                signal.signal(signal.SIGTERM, self._handler)
            rank_zero_only.rank = 0  # type: ignore[attr-defined]
            for name, value in self._environ.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def doing(self, what: str) -> None:
        """Note what this process does, for the message of the others if it dies."""
        if self._heart is not None:
            self._heart.doing = what

    def callbacks(self) -> list[Callback]:
        """What notes the steps of the training loop."""
        return [NoteSteps(self.doing)]

    def wait(self) -> None:
        """Wait until the first process has found its settings good; it waits for nobody."""
        if not self.launch.leads:
            self.doing("waiting for the first process")
            self._read("settings")

    def follow(self, config: TrainConfig) -> TrainConfig:
        """Wait until it is this process's turn: process 0 goes first, then the first of each machine, then the rest.

        So what one process writes or draws, the others find. Returns: ``config`` with the first process's seed.
        Raises: UserError if this process was started with other settings.
        """
        flat = _flat(config)
        if self.launch.leads:
            self._publish("settings", flat)
            self.doing("reading data")
            return config
        theirs = self._read("settings")
        _compare_settings(flat, theirs, self.launch)
        seed = int(theirs["random_seed"])
        if config.runtime.random_seed not in (-1, seed):
            _refuse_settings(self.launch, {"random_seed": (config.runtime.random_seed, seed)})
        turn = 0 if self.launch.leads_machine else self.launch.rank - self.launch.local_rank
        self._read(f"ready {turn}")
        self.doing("reading data")
        return replace(config, runtime=replace(config.runtime, random_seed=seed))

    def agree(self, what: Mapping[str, Any]) -> None:
        """Make sure that this process goes by the same files and the same resume point as the first one.

        Raises: UserError naming what differs.
        """
        mine = json.loads(json.dumps(dict(what)))
        if self.launch.leads:
            self._publish("agreed", mine)
            return
        theirs = self._read("agreed")
        names = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)][:_SHOWN_SETTINGS]
        if names:
            raise UserError(
                f"process {self.launch.rank}, on machine {self.launch.node_rank}, finds other files than the first one",
                found=", ".join(f"{name} {mine.get(name)}" for name in names),
                expected=", ".join(f"{name} {theirs.get(name)}" for name in names),
                fix="--proj_dir and the data on a file system that all machines share, or copied from machine 0",
            )

    def ready(self, words: Sequence[str]) -> None:
        """Say that the files of this machine are as they should be: the others may read them.

        Args:
            words: of the command line, for the processes that this one has to start.
        """
        self.doing("building the model")
        self._publish(f"ready {self.launch.rank}", True)
        if self.launch.starts_others:
            self._start_others(words)
        if isinstance(self._heart, FirstHeart) and self._heart.all_by is None:
            self._heart.all_by = time.monotonic() + JOIN_SECONDS

    def _start_others(self, words: Sequence[str]) -> None:
        program = [sys.executable, str(Path(sys.argv[0]).resolve()), *words]
        for local_rank in range(1, self.launch.devices):
            own = {"LOCAL_RANK": str(local_rank), STARTED_BY_US: str(os.getpid())}
            self._children[self.launch.rank + local_rank] = subprocess.Popen(program, env={**os.environ, **own})

    def _end_children(self, at_once: bool) -> None:
        for child in unfinished(self._children.values(), 0.0 if at_once else self._timeout):
            child.kill()
            child.wait()

    def _address(self) -> tuple[str, int]:
        """Where the first process is; Lightning is told the same, and which process this is."""
        launch = self.launch
        if launch.by == "SLURM":
            from lightning_fabric.plugins.environments import SLURMEnvironment

            cluster = SLURMEnvironment(auto_requeue=False)
            # both also set the variables they are named after
            return cluster.main_address, cluster.main_port
        if launch.by != "torchrun":
            if launch.by == "the environment" and "MASTER_PORT" not in os.environ:
                raise UserError("MASTER_PORT is not set", fix="MASTER_ADDR and MASTER_PORT, the same for all processes")
            self._set("MASTER_ADDR", os.environ.get("MASTER_ADDR", "127.0.0.1"))
            self._set("NODE_RANK", str(launch.node_rank))
            self._set("LOCAL_RANK", str(launch.local_rank))
        return os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "0"))

    def _set(self, name: str, value: str) -> None:
        self._environ.setdefault(name, os.environ.get(name))
        os.environ[name] = value

    def _open_store(self, address: str, port: int) -> TCPStore:
        """The board that all read; PyTorch's processes find each other there too, so it is one port for both."""
        launch = self.launch
        serves = launch.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        patience = _OUR_JOIN_SECONDS if launch.by == "python train.py" else JOIN_SECONDS
        try:
            store = TCPStore(
                address, port, None, serves, timedelta(seconds=patience), wait_for_workers=False, multi_tenant=True
            )
        except (torch.distributed.DistError, RuntimeError, OSError) as reason:
            if serves:
                raise UserError(
                    f"port {port} of this machine cannot be opened for the other processes",
                    found=str(reason).splitlines()[0],
                    fix="another MASTER_PORT in the environment, for all of them",
                ) from reason
            raise UserError(
                f"process {launch.rank} did not find the first one at {address}:{port} within {patience:g} s",
                found=str(reason).splitlines()[0],
                expected="the first process running, and its port open between the machines",
            ) from reason
        self._set("MASTER_PORT", str(store.port))
        return store

    def _open_heart(self, address: str) -> Heart:
        launch, timeout = self.launch, self._timeout
        if launch.leads:
            first = FirstHeart(launch, timeout, self._give_up, self._children)
            if not launch.starts_others:
                first.all_by = time.monotonic() + JOIN_SECONDS
            self._publish("heart", [first.port, first.token])
            return first
        port, token = self._read("heart")
        place = "127.0.0.1" if launch.num_nodes == 1 else address
        try:
            return OtherHeart((place, port), token, launch, timeout, self._give_up, self._children)
        except OSError as reason:
            raise UserError(
                f"process {launch.rank} cannot reach the first one at {place}:{port}",
                found=reason,
                expected="all ports open between the machines that train together",
            ) from reason

    def _publish(self, name: str, value: Any) -> None:
        assert self._store is not None
        self._store.set(_key(name), json.dumps(value))

    def _read(self, name: str) -> Any:
        """What the first process has published, waited for as long as it lives."""
        assert self._store is not None
        until = time.monotonic() + JOIN_SECONDS
        while not self._store.check([_key(name)]):
            if self._heart is None and time.monotonic() > until:
                raise UserError(f"process {self.launch.rank}: the first one does not answer", fix="start all anew")
            time.sleep(_POLL_SECONDS)
        return json.loads(self._store.get(_key(name)))

    def _explain(self, reason: BaseException) -> None:
        """Give the heart time to find out whether another process is at fault; it then ends this one."""
        assert self._heart is not None
        if self._handler is not None:
            # it is ending, and first has to say why
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._heart.main_failed = True
        time.sleep(self._timeout + 2 if _is_lost_connection(reason) else _LOOK_SECONDS)

    def _on_sigterm(self, process: int, number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            # a worker that was forked off
            os._exit(_EXIT_SIGTERM)
        self._terminated = True
        raise SystemExit(_EXIT_SIGTERM)

    def _give_up(self, verdict: Verdict) -> None:
        """End this process, whatever its main thread is doing. Files are written whole or not at all."""
        for child in unfinished(self._children.values(), 0.5):
            child.kill()
        starter = self.launch.rank - self.launch.local_rank
        if self.launch.by == "python train.py" and verdict.rank == starter:
            # stopped, it would never notice
            _kill(int(os.environ[STARTED_BY_US]))
        if self._prints(verdict):
            text = UserError(
                f"process {verdict.rank} of {self.launch.world_size} ({verdict.place}) {verdict.cause}",
                found=f"when last heard of it was {verdict.doing}" if verdict.doing else None,
                fix=_within(2.0, self._way_on),
            ).render()
            # one write, so that lines of several processes do not mix
            sys.stderr.write(text + "\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_PEER_LOST)

    def _prints(self, verdict: Verdict) -> bool:
        """One process of each machine speaks, and none where the one at fault has spoken itself."""
        if verdict.rank == self.launch.rank:
            return self.launch.leads_machine
        here = verdict.rank // self.launch.devices == self.launch.node_rank
        if here and verdict.told:
            return False
        speaker = 1 if here and verdict.rank % self.launch.devices == 0 and self.launch.devices > 1 else 0
        return self.launch.local_rank == speaker

    def _way_on(self) -> str:
        points = newest_first(resume_folder(self._output))
        if not points:
            return "start the same command again; nothing was saved yet"
        words = "" if self._output.resume == "auto" else " with --resume auto"
        return f"the same command{words} goes on from step {int(points[0].name.removeprefix('step-'))}"


def _is_lost_connection(reason: BaseException) -> bool:
    """Whether a computation shared by several processes failed because one of them is not there any more."""
    if not isinstance(reason, RuntimeError):
        return False
    text = str(reason).lower()
    return isinstance(reason, torch.distributed.DistError) or any(words in text for words in _LOST)


def _first_line(reason: BaseException) -> str:
    if isinstance(reason, UserError):
        return f"ended: {reason.what}"
    if isinstance(reason, KeyboardInterrupt | SystemExit):
        return "was ended by a signal"
    lines = str(reason).strip().splitlines()
    return f"ended: {type(reason).__name__}" + (f": {lines[0]}" if lines else "")


def _key(name: str) -> str:
    # torchrun starts processes again under the same store
    return f"rwkvpeft {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {name}"


def _flat(config: TrainConfig) -> dict[str, Any]:
    groups = (getattr(config, name) for name in config.__dataclass_fields__)
    flat = {name: getattr(group, name) for group in groups for name in group.__dataclass_fields__}
    values: dict[str, Any] = json.loads(json.dumps(flat))
    return values


def _compare_settings(mine: dict[str, Any], theirs: dict[str, Any], launch: Launch) -> None:
    differing = {
        name: (mine.get(name), theirs.get(name))
        for name in {**theirs, **mine}
        if name not in _MAY_DIFFER and mine.get(name) != theirs.get(name)
    }
    if differing:
        _refuse_settings(launch, differing)


def _refuse_settings(launch: Launch, differing: Mapping[str, tuple[Any, Any]]) -> None:
    shown = list(differing.items())[:_SHOWN_SETTINGS]
    raise UserError(
        f"process {launch.rank}, on machine {launch.node_rank}, was started with other settings than the first one",
        found=", ".join(f"--{name} {mine}" for name, (mine, _) in shown),
        expected=", ".join(f"--{name} {theirs}" for name, (_, theirs) in shown),
        fix="the same command on all machines",
    )


def _kill(pid: int) -> None:
    try:
        if os.getppid() == pid:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _within(seconds: float, look: Callable[[], str]) -> str:
    """What ``look`` finds, unless the file system hangs."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(look()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else "the same command goes on from the newest resume point"
