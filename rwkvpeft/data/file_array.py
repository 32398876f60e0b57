"""Numbers in a file that others may change while a run reads it.

A memory map of a file that was cut short kills the process with SIGBUS. Here each part is read when it is asked for,
and compared with what the file was when it was opened.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkvpeft.errors import ContractError, UserError

_FIX = "the same command goes on from the last resume point, once the file is as it was"


class FileChanged(UserError):
    """A data file is not what it was when the run opened it."""


class Stamp(NamedTuple):
    """What tells a file from what it becomes when somebody writes to it or puts another in its place."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """From what ``os.stat`` says."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


class FileArray:
    """``count`` numbers of a file, of which slices are read; shaped (count,).

    The file stays open: one that is put in its place under the same name does not disturb.

    Args:
        offset: bytes before the first number.
        stamp: of the file as another process opened it; None if this is the first.
    Raises: UserError if the file cannot be opened, FileChanged if it is not the one of ``stamp``.
    """

    def __init__(
        self, path: Path | str, dtype: np.dtype, count: int, offset: int = 0, stamp: Stamp | None = None
    ) -> None:
        self.path = Path(path)
        self.dtype = dtype
        self._count = count
        self._offset = offset
        self._lock = threading.Lock()
        # not there on Windows
        self._read_at: Callable[[int, int, int], bytes] = getattr(os, "pread", self._seek_and_read)
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as reason:
            raise UserError(f"cannot read {path}", found=reason.strerror, fix="check the path") from reason
        self._descriptor = self._file.fileno()
        found = Stamp.of(os.fstat(self._descriptor))
        self.stamp = stamp or found
        self.require(found)
        if offset + count * dtype.itemsize > found.size:
            raise self._changed(found)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        """The numbers of a slice without steps, read-only.

        Raises: FileChanged if the file is not what it was.
        """
        start, stop, step = part.indices(self._count)
        if step != 1:
            raise ContractError(f"every {step}th number of {self.path}")
        return self.read(start, max(0, stop - start))

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` numbers from number ``start`` on, read-only. Raises: FileChanged as ``self[...]``."""
        item, stamp = self.dtype.itemsize, self.stamp
        try:
            content = self._read_bytes(self._offset + start * item, count * item)
            # after reading: what was read before a change is not mixed with what was read behind it
            found = os.fstat(self._descriptor)
        except OSError as reason:
            raise FileChanged(f"{self.path} can no longer be read", found=reason.strerror, fix=_FIX) from reason
        if len(content) != count * item or found.st_mtime_ns != stamp.mtime_ns or found.st_size != stamp.size:
            raise self._changed(Stamp.of(found))
        return np.frombuffer(content, dtype=self.dtype)

    def require(self, stamp: Stamp) -> None:
        """Raises: FileChanged if the file was opened with another stamp."""
        if stamp != self.stamp:
            raise self._changed(stamp)

    @property
    def is_replaced(self) -> bool:
        """Whether another file has the name now, or none."""
        try:
            return Stamp.of(os.stat(self.path)).inode != self.stamp.inode
        except OSError:
            return True

    def __reduce__(self) -> tuple[type[FileArray], tuple[Path, np.dtype, int, int, Stamp]]:
        return FileArray, (self.path, self.dtype, self._count, self._offset, self.stamp)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _read_bytes(self, position: int, wanted: int) -> bytes:
        content = self._read_at(self._descriptor, wanted, position)
        # the system may give less at once, at most 2 GiB
        while 0 < len(content) < wanted:
            more = self._read_at(self._descriptor, wanted - len(content), position + len(content))
            if not more:
                break
            content += more
        return content

    def _seek_and_read(self, descriptor: int, wanted: int, position: int) -> bytes:
        with self._lock:
            os.lseek(descriptor, position, os.SEEK_SET)
            return os.read(descriptor, wanted)

    def _changed(self, found: Stamp) -> FileChanged:
        before = self.stamp
        what = [f"{found.size} bytes"]
        if found.size == before.size:
            what.append("written to since" if found.inode == before.inode else "another file")
        return FileChanged(
            f"the data file changed while the run was reading it: {self.path}",
            found=what, expected=f"{before.size} bytes, as when the run began", fix=_FIX,
        )
