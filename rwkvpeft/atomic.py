"""Files that appear complete or not at all, and work that one process does while others wait."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from rwkvpeft.errors import UserError


class NotWrittenError(UserError):
    """The operating system refused to write: a full disk, a quota, no permission, a folder that is gone."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place: a crash leaves an older file whole.

    Args:
        path: where the file is to appear; its folder is made if it is missing.
        write: is given the path of the partial file, on the same file system and with the same suffix.
    Raises:
        NotWrittenError: the file cannot be written (permission, full disk). Whatever else ``write`` raises
            passes through. In both cases nothing of the partial file stays behind.
    """
    partial = partial_beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            make_durable(partial)
            os.replace(partial, path)
            make_durable(path.parent)
        except BaseException:
            # the first reason counts, not that the rest cannot be removed
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def partial_beside(path: Path) -> Path:
    """A fresh hidden name in the folder of ``path``, with its suffix, for what is not complete yet."""
    return path.with_name(f".{path.stem}.partial-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")


def make_durable(path: Path) -> None:
    """Return when a file's bytes, or a folder's list of names, are on the disk."""
    if path.is_dir():
        # Windows and some network file systems cannot flush a folder; there a rename is as durable as it gets
        with contextlib.suppress(OSError):
            _flush(path, os.O_RDONLY)
    else:
        _flush(path, os.O_RDWR)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses in this block into a NotWrittenError that names ``path``."""
    try:
        yield
    except (OSError, RuntimeError) as reason:
        refusal = _refusal(reason)
        if refusal is None:
            raise
        raise NotWrittenError(f"cannot write {path}", found=refusal.strerror or str(refusal)) from reason


def _refusal(reason: BaseException | None) -> OSError | None:
    """What the operating system said. PyTorch reports its own dismay at a file cut short, and it second."""
    while reason is not None and not isinstance(reason, OSError):
        reason = reason.__cause__ or reason.__context__
    return reason


@contextlib.contextmanager
def alone(path: Path, waits: Callable[[], object]) -> Iterator[None]:
    """Keep other processes of this machine out of what is done inside.

    The system takes the lock from a process that dies, so that none is ever left over. On Windows, and where ``path``
    cannot be locked, nobody is kept out.

    Args:
        path: the file that stands for the lock; it stays behind, empty.
        waits: is called before waiting for another process.
    """
    with contextlib.ExitStack() as held:
        if os.name != "nt":
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                _lock(held.enter_context(path.open("w")), waits)
        yield


def is_alone_with(file: IO[bytes]) -> bool:
    """Keep other processes of this machine that ask the same out of an open file until it is closed; whether no other
    has it. Nobody is kept out on Windows, and where files cannot be locked."""
    if os.name == "nt":
        return True
    import fcntl  # not there on Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _lock(file: IO[str], waits: Callable[[], object]) -> None:
    import fcntl  # not there on Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waits()
        fcntl.flock(file, fcntl.LOCK_EX)
