"""Data that do not come: a file system that hangs is told of, and ends the run after a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TypeVar

_Item = TypeVar("_Item")

_FIRST_WORD_SECONDS = 30.0
_LOOKS_A_SECOND = 4


def waited(items: Iterator[_Item], waiting: Callable[[], AbstractContextManager[None]]) -> Iterator[_Item]:
    """The same items, each of which is waited for inside ``waiting``."""
    while True:
        with waiting():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


class ReadWatch:
    """Watches, while a ``with`` block lasts, how long the training process waits for data.

    It says so after 30 seconds, then after 60, 120 and so on. The process cannot be woken while its system reads, so
    that the watch itself ends it.

    Args:
        name: what is read, for people.
        report: takes a line of text.
        timeout: seconds after which the run ends; 0 for never.
        end: is called then, from another thread, with the message; it does not return.
    """

    def __init__(self, name: str, report: Callable[[str], None], timeout: float, end: Callable[[str], None]) -> None:
        self._name = name
        self._report = report
        self._timeout = timeout
        self._end = end
        self._first_word = min(_FIRST_WORD_SECONDS, timeout / 2) if timeout else _FIRST_WORD_SECONDS
        self._since: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ReadWatch:
        self._stop.clear()
        self._thread = threading.Thread(target=self._look, name="read watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, reason: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        self._thread = None

    @contextmanager
    def waiting(self) -> Generator[None, None, None]:
        """Inside the block the process waits for data."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _look(self) -> None:
        seen, next_word = None, self._first_word
        pause = min(1.0, self._first_word / _LOOKS_A_SECOND)
        while not self._stop.wait(pause):
            since = self._since
            if since is None or since != seen:
                seen, next_word = since, self._first_word
                continue
            seconds = time.monotonic() - since
            if self._timeout and seconds >= self._timeout:
                self._end(f"no data from {self._name} for {seconds:.0f} s")
                return
            if seconds >= next_word:
                self._report(f"waiting for data from {self._name} since {seconds:.0f} s")
                next_word *= 2
