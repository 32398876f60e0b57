"""How far work on a large file is, for people who wait."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 5.0


class Progress(NamedTuple):
    """How far a stage is: bytes read, or documents written; ``tokens`` so far in this stage."""

    stage: str
    done: int
    total: int
    tokens: int


class ProgressLines:
    """Shows progress as a bar on a terminal, and as a line now and then where output goes to a file."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._bar: tqdm | None = None
        self._stage = ""
        self._printed = self._started = time.monotonic()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def show(self, progress: Progress) -> None:
        """Report a stage's progress; cheap enough to be called a thousand times a second. Of several processes that
        train together only the first one does."""
        if getattr(rank_zero_only, "rank", 0):
            return
        if progress.stage != self._stage:
            self._close()
            if self._stage:
                self._started = self._printed = time.monotonic()
            self._stage = progress.stage
        if self._is_terminal:
            self._show_bar(progress)
            return
        now, is_last = time.monotonic(), progress.done >= progress.total
        if is_last or now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            share = 100 * progress.done / max(progress.total, 1)
            rate = progress.tokens / max(now - self._started, 1e-3) / 1e6
            line = f"{progress.stage}: {share:.0f} %, {progress.tokens} tokens, {rate:.2f} million a second"
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def show_slow(self, progress: Progress) -> None:
        """As ``show``, and nothing at all for work that is done before the first line is due."""
        if progress.done < progress.total or self._bar is not None or self._printed > self._started:
            self.show(progress)

    def _show_bar(self, progress: Progress) -> None:
        from tqdm import tqdm

        if self._bar is None:
            is_bytes = progress.stage == "tokenise"
            self._bar = tqdm(
                total=progress.total, desc=progress.stage, unit="B" if is_bytes else " documents", unit_scale=True
            )
        self._bar.set_postfix_str(f"{progress.tokens / 1e6:.1f} M tokens", refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
