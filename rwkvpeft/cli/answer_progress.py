"""How far the answers to a file of questions are, for people who wait."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

    from rwkvpeft.generation.batched import Count

_SECONDS_BETWEEN_LINES = 10.0


class AnswerProgress:
    """A bar on a terminal, and a line now and then where output goes to a file.

    Args:
        total: answers in all.
        before: answers that were there before this start.
    """

    def __init__(self, total: int, before: int) -> None:
        self._total, self._before = total, before
        self._started = self._printed = time.monotonic()
        self._bar: tqdm | None = None
        self._tokens = 0

    def __enter__(self) -> AnswerProgress:
        self._started = self._printed = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, initial=self._before, unit=" answers", leave=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def tokens_per_second(self) -> float:
        """Tokens drawn in a second since the start, the time for prompts included."""
        return self._tokens / max(time.monotonic() - self._started, 1e-6)

    def show(self, count: Count) -> None:
        """Report what was done since the start; cheap enough for every token."""
        self._tokens = count.tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(self._before + count.answers - self._bar.n)
            return
        now = time.monotonic()
        if now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            print(self._line(count.answers, now - self._started), file=sys.stderr, flush=True)

    def _line(self, answers: int, seconds: float) -> str:
        done = self._before + answers
        left = f", about {_time(seconds * (self._total - done) / answers)} left" if answers else ""
        return f"{done:,} of {self._total:,} answers, {self.tokens_per_second:,.0f} tokens/s{left}"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"
