"""Whether the other processes of a run are still alive, told by a thread that no computation holds up.

The first process listens; each other one holds a connection to it and says every few seconds who it is and what it
does. A process that dies closes its connection, which is known at once; one that is stopped, or whose machine or
network is gone, falls silent. The first process tells the others of it.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rwkvpeft.config.launcher import Launch

GRACE_SECONDS = 5.0
"""For the main thread to end by itself after another process has: often both met the same mistake."""

_TICK_SECONDS = 0.2
# a thread that has not run for so long was stopped itself and cannot blame others for their silence
_OWN_PAUSE_SECONDS = 3.0
_LONGEST_MESSAGE = 1 << 14


class Verdict(NamedTuple):
    """Why a run cannot go on: ``rank`` is the process at fault, ``cause`` ends a sentence that begins with it.

    ``told``: that process has said so itself, and printed it. ``doing`` is what it was last known to do.
    """

    rank: int
    cause: str
    told: bool = False
    place: str = ""
    doing: str = ""


@dataclass
class Member:
    """What is known of another process; ``heard`` is when it last spoke, on this process's clock."""

    rank: int
    host: str = ""
    pid: int = 0
    doing: str = ""
    ended: str | None = None
    heard: float = field(default_factory=time.monotonic)
    gone: bool = False

    @property
    def place(self) -> str:
        """Where it runs."""
        return f"pid {self.pid} on {self.host}" if self.host else "which never answered"


class _Line:
    """One connection: JSON objects, one a line, never waited for."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._received = b""

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.connection.send(json.dumps(message).encode() + b"\n")
        except OSError:
            # full or closed: whoever reads here finds out by silence or by the end of the connection
            return

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have come, and whether the connection is closed."""
        closed = False
        try:
            while part := self.connection.recv(_LONGEST_MESSAGE):
                self._received += part
            closed = True
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        *lines, self._received = self._received.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return [], True
        strange = len(self._received) > _LONGEST_MESSAGE or not all(isinstance(message, dict) for message in messages)
        return ([], True) if strange else (messages, closed)


class Heart:
    """This process's beat and its ear for the others.

    Args:
        launch: which process this is.
        timeout: seconds of silence after which a process counts as dead.
        give_up: called in the heart's thread, once, when the run cannot go on; it is to end the process.
        children: processes that this one has started, by rank; may grow.
    """

    def __init__(
        self,
        launch: Launch,
        timeout: float,
        give_up: Callable[[Verdict], None],
        children: dict[int, subprocess.Popen[bytes]],
    ) -> None:
        self.doing = "starting"
        self.main_failed = False
        self._launch, self._timeout, self._give_up, self._children = launch, timeout, give_up, children
        self._interval = min(2.0, timeout / 5)
        self._me = Member(launch.rank, socket.gethostname(), os.getpid())
        self._parent = os.getppid()
        self._selector = selectors.DefaultSelector()
        self._members: dict[int, Member] = {}
        self._ended: str | None = None
        self._said_so = threading.Event()
        self._stopped = threading.Event()
        self._pending: tuple[Verdict, float] | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def leave(self, ended: str) -> None:
        """Tell the others that this process ends, with ``ended`` as the reason; empty for the planned end."""
        self._ended = ended
        if self._thread.is_alive():
            self._said_so.wait(self._interval)
            self._wait_for_others(ended)
        self._stopped.set()
        self._thread.join(self._timeout)

    def _wait_for_others(self, ended: str) -> None:
        """Overridden by the first process, whom the others need until they end."""

    def _run(self) -> None:
        last = time.monotonic()
        beaten = 0.0
        try:
            while not self._stopped.is_set():
                self._listen(self._selector.select(_TICK_SECONDS))
                now = time.monotonic()
                if now - last > _OWN_PAUSE_SECONDS:
                    for member in self._members.values():
                        member.heard = now
                last = now
                if now - beaten > self._interval or (self._ended is not None and not self._said_so.is_set()):
                    beaten = now
                    self._beat()
                    if self._ended is not None:
                        self._said_so.set()
                self._judge(now)
        finally:
            for key in list(self._selector.get_map().values()):
                _close(key.fileobj)
            self._selector.close()

    def _listen(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        raise NotImplementedError

    def _beat(self) -> None:
        raise NotImplementedError

    def _message(self) -> dict[str, Any]:
        me = self._me
        return {"rank": me.rank, "host": me.host, "pid": me.pid, "doing": self.doing, "ended": self._ended}

    def _hear(self, member: Member, message: dict[str, Any]) -> None:
        member.heard = time.monotonic()
        member.host, member.doing = str(message.get("host", "")), str(message.get("doing", ""))
        member.pid = int(message.get("pid", 0))
        ended = message.get("ended")
        member.ended = None if ended is None else str(ended)
        if member.ended:
            self._blame(member, member.ended, told=True)

    def _judge(self, now: float) -> None:
        if self._launch.watches_parent and os.getppid() != self._parent:
            self._me.doing = self.doing
            self._blame(self._me, f"has lost the process that started it (pid {self._parent})")
        for member in self._members.values():
            if not member.gone and member.ended is None and now - member.heard > self._timeout:
                self._blame(member, f"has not been heard of for {self._timeout:g} s: it is stopped, or its machine or "
                            "the network is down")
        if self._pending is not None and self._ended is None:
            verdict, due = self._pending
            if now >= due or self.main_failed:
                self._tell(verdict)
                self._give_up(verdict)
                self._stopped.set()

    def _blame(self, member: Member, cause: str, *, told: bool = False) -> None:
        """Note why the run cannot go on; the first reason stays."""
        self._learn(Verdict(member.rank, cause, told, member.place, member.doing))

    def _learn(self, verdict: Verdict) -> None:
        if self._pending is None and self._ended is None:
            self._pending = verdict, time.monotonic() + (GRACE_SECONDS if verdict.told else 0.0)

    def _lose(self, member: Member) -> None:
        """The connection to a process has ended."""
        member.gone = True
        if member.ended is None:
            self._blame(member, self._death(member.rank))

    def _death(self, rank: int) -> str:
        child = self._children.get(rank)
        if child is not None:
            try:
                code = child.wait(1.0)
            except subprocess.TimeoutExpired:
                return "has closed its connection"
            if code < 0:
                more = ", by hand or by the system for lack of memory" if code == -signal.SIGKILL else ""
                return f"was killed by {signal.Signals(-code).name}{more}"
            return f"has ended with exit code {code}"
        return "has ended without a word: it was killed or has crashed"

    def _tell(self, verdict: Verdict) -> None:
        """Overridden by the first process, which tells the others why it ends."""


class FirstHeart(Heart):
    """That of process 0, to which the others are connected."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        everywhere = self._launch.num_nodes > 1
        self._listener = socket.create_server(("" if everywhere else "127.0.0.1", 0))
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.token = secrets.token_hex(16)
        self.all_by: float | None = None
        """When every process must have come, on this process's clock; None while they need not yet."""
        self._lines: dict[int, _Line] = {}

    @property
    def port(self) -> int:
        """Where the others find it."""
        return int(self._listener.getsockname()[1])

    def _listen(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in events:
            if key.data is None:
                self._accept()
                continue
            messages, closed = key.data.receive()
            for message in messages:
                self._take(key.data, message)
            if closed:
                self._selector.unregister(key.fileobj)
                _close(key.fileobj)
                for rank, line in self._lines.items():
                    if line is key.data:
                        self._lose(self._members[rank])
        for rank, child in list(self._children.items()):
            if rank not in self._members and child.poll():
                # it died before it could say who it is
                self._lose(self._members.setdefault(rank, Member(rank, self._me.host, child.pid, "starting")))

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._selector.register(connection, selectors.EVENT_READ, _Line(connection))

    def _take(self, line: _Line, message: dict[str, Any]) -> None:
        rank = message.get("rank")
        if message.get("token") != self.token or not isinstance(rank, int):
            # a stranger
            return
        if rank not in self._lines:
            self._lines[rank] = line
            self._members[rank] = Member(rank)
            # at once: a first process that dies before its next beat has a name already
            line.send(self._message() | {"verdict": None})
        self._hear(self._members[rank], message)

    def _judge(self, now: float) -> None:
        if self.all_by is not None and now > self.all_by:
            missing = set(range(1, self._launch.world_size)) - set(self._members)
            for rank in sorted(missing):
                self._blame(Member(rank), "has not come: it was not started, or cannot reach this machine")
        super()._judge(now)

    def _beat(self) -> None:
        self._send(None)

    def _tell(self, verdict: Verdict) -> None:
        self._send(verdict)
        # what is not read when a process ends may be taken back from those it was sent to
        time.sleep(2 * _TICK_SECONDS)

    def _send(self, verdict: Verdict | None) -> None:
        message = self._message() | {"verdict": None if verdict is None else verdict._asdict()}
        for line in self._lines.values():
            line.send(message)

    def _learn(self, verdict: Verdict) -> None:
        if self._pending is None and self._ended is None and verdict.rank != self._me.rank:
            # at once: each process then has its own time to end by itself
            self._send(verdict)
        super()._learn(verdict)

    def _wait_for_others(self, ended: str) -> None:
        """Until all have ended; after a mistake only as long as they need to learn of it."""
        until = time.monotonic() + (2 * GRACE_SECONDS if ended else 2 * self._timeout)
        expected = set(range(1, self._launch.world_size))
        while time.monotonic() < until and self._thread.is_alive():
            done = {rank for rank, member in self._members.items() if member.gone or member.ended is not None}
            done |= {rank for rank, child in self._children.items() if child.poll() is not None}
            if expected <= done or (ended and not self._members):
                return
            time.sleep(_TICK_SECONDS / 2)


class OtherHeart(Heart):
    """That of every other process, connected to the first one at ``address``, which knows it by ``token``."""

    def __init__(self, address: tuple[str, int], token: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._token = token
        self._line = _Line(socket.create_connection(address, timeout=self._timeout))
        self._selector.register(self._line.connection, selectors.EVENT_READ, self._line)
        self._first = self._members[0] = Member(0, address[0])

    def _listen(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        if not events:
            return
        messages, closed = self._line.receive()
        for message in messages:
            verdict = message.get("verdict")
            if isinstance(verdict, dict) and not (verdict["told"] and verdict["rank"] == self._me.rank):
                self._learn(Verdict(**verdict))
            self._hear(self._first, message)
        if closed:
            self._selector.unregister(self._line.connection)
            _close(self._line.connection)
            self._lose(self._first)

    def _beat(self) -> None:
        self._line.send(self._message() | {"token": self._token})

    def _tell(self, verdict: Verdict) -> None:
        if verdict.rank == self._me.rank:
            self._line.send(self._message() | {"token": self._token, "ended": verdict.cause})


def _close(connection: Any) -> None:
    try:
        connection.close()
    except OSError:
        return


def unfinished(children: Iterable[subprocess.Popen[bytes]], seconds: float) -> list[subprocess.Popen[bytes]]:
    """Those of ``children`` that have not ended within so many seconds."""
    until = time.monotonic() + seconds
    left = []
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            left.append(child)
    return left
