"""The answers that a run learns from, with what they were worth: ``rollouts.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from rwkvpeft.atomic import writing
from rwkvpeft.training.callbacks.lines import LineFile, keep_lines
from rwkvpeft.training.module import RunProgress

ROLLOUTS = "rollouts"


class RolloutLog(pl.Callback):
    """One line for each answer, with the optimizer step that it is learned from first.

    Every process has prompts of its own: the first one writes ``rollouts.jsonl``, the others ``rollouts-rank-N.jsonl``.
    After a resume the files go on where the resume point stood. None of them ends a run when it cannot be written.

    Args:
        folder: ``proj_dir``.
        report: takes a line of text.
    """

    def __init__(self, folder: Path, progress: RunProgress, report: Callable[[str], None]) -> None:
        super().__init__()
        self._folder = folder
        self._progress = progress
        self._report = report
        self._file: LineFile | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file, cut back to the step the run goes on from."""
        rank = trainer.global_rank
        path = self._folder / f"{ROLLOUTS}{f'-rank-{rank}' if rank else ''}.jsonl"
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            keep_lines(path, lambda line: json.loads(line)["step"] <= self._progress.step)
        self._file = LineFile(path, self._report)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add an answer."""
        if self._file is not None:
            whole = {"step": self._progress.step + 1, **line}
            self._file.write(json.dumps(whole, ensure_ascii=False) + "\n")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the file."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the file."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
