"""Who writes a run's files: the training loop itself, or a thread beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Does pieces of writing one after another, in the order they are given.

    In the background no more than the files of one step wait to be written: ``begin`` waits for those of the step
    before, so that copies of what is trained never pile up. The thread dies with the process, which leaves whatever it
    was writing as a partial file.

    Args:
        background: whether a thread writes while training goes on.
    """

    def __init__(self, *, background: bool = False) -> None:
        self.background = background
        self._step = -1
        self._newest: threading.Thread | None = None
        self._reason: BaseException | None = None

    def begin(self, step: int) -> None:
        """Wait for the files of earlier steps; call it before copying what is to be written after ``step`` steps.

        Raises: what went wrong in the background.
        """
        if step != self._step:
            self.wait()
            self._step = step

    def add(self, work: Callable[[], None]) -> None:
        """Do ``work``, in the background after what was given before."""
        if not self.background:
            work()
            return
        before = self._newest

        def run() -> None:
            if before is not None:
                before.join()
            try:
                work()
            except BaseException as reason:  # noqa: BLE001 -- raised by ``look``, in the thread that trains
                self._reason = self._reason or reason

        self._newest = threading.Thread(target=run, name="writer", daemon=True)
        self._newest.start()

    def look(self) -> None:
        """Raises: what went wrong in the background."""
        if self._reason is not None:
            reason, self._reason = self._reason, None
            raise reason

    def wait(self) -> None:
        """Return when all is written. Raises: what went wrong in the background."""
        if self._newest is not None:
            self._newest.join()
            self._newest = None
        self.look()
