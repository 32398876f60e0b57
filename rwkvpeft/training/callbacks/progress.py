"""How far the run is, while it runs: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm

from rwkvpeft.training.module import RwkvModule
from rwkvpeft.training.step_record import SHOWN_FIGURES, StepRecord, loss_text

_LINE_SECONDS = 5.0


class Progress(pl.Callback):
    """Loss, learning rate, tokens per second and the time left.

    Args:
        report: takes a line of text where there is no terminal.
        on_terminal: whether to draw a bar; None asks the standard error stream.
    """

    def __init__(self, report: Callable[[str], None], *, on_terminal: bool | None = None) -> None:
        super().__init__()
        self._report = report
        self._on_terminal = sys.stderr.isatty() if on_terminal is None else on_terminal
        self._bar: tqdm[Any] | None = None
        self._last_line = 0.0
        self._recent: list[StepRecord] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        assert isinstance(pl_module, RwkvModule)
        if self._on_terminal and trainer.is_global_zero:
            self._bar = tqdm(
                total=pl_module.plan.total_steps, initial=pl_module.progress.step, unit="step", dynamic_ncols=True
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step that has just been finished, if one has."""
        assert isinstance(pl_module, RwkvModule)
        record = pl_module.finished
        if record is None or not trainer.is_global_zero:
            return
        self._recent = [*self._recent[-19:], record]
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(record), refresh=False)
            self._bar.update()
            return
        last = record.step == pl_module.plan.total_steps
        if last or time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._report(self._line(record, pl_module.plan.total_steps))

    def _figures(self, record: StepRecord) -> str:
        loss = "not finite" if record.loss is None else loss_text(record.loss)
        shown = [f"{name} {record.metrics[name]:.3g}" for name in SHOWN_FIGURES if name in record.metrics]
        loss = ", ".join([loss, *shown])
        return f"loss {loss}, lr {record.lr:.3g}, {self._tokens_per_second():,.0f} tokens/s"

    def _line(self, record: StepRecord, total_steps: int) -> str:
        seconds = sum(recent.t_cost for recent in self._recent) / len(self._recent)
        left = timedelta(seconds=round(seconds * (total_steps - record.step)))
        return f"step {record.step}/{total_steps}  epoch {record.epoch}  {self._figures(record)}, {left} left"

    def _tokens_per_second(self) -> float:
        seconds = sum(record.t_cost for record in self._recent)
        return sum(record.tokens for record in self._recent) / max(seconds, 1e-9)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
