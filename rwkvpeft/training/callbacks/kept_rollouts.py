"""Answers that several steps learn from, on the disk as long as a resume point may need them."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from rwkvpeft.atomic import write_whole
from rwkvpeft.objectives.rollouts import step_of
from rwkvpeft.training.module import RwkvModule

_POINT = re.compile(r"step-(\d+)$")


class KeptRolloutFiles(pl.Callback):
    """Deletes files of answers that no step of this run, and none after a resume point, learns from any more.

    Args:
        folder: of the answers.
        points: of the resume points.
        steps: optimizer steps that learn from the same answers.
        earlier: of the answers of the run whose resume point this one goes on from, if that is in another folder.
    """

    def __init__(self, folder: Path, points: Path, steps: int, earlier: Path | None = None) -> None:
        super().__init__()
        self._folder = folder
        self._points = points
        self._steps = steps
        self._earlier = earlier

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop what a run drew from here on that was given up, and take over what an earlier run drew before.

        Raises: NotWrittenError if that cannot be written here.
        """
        assert isinstance(pl_module, RwkvModule)
        step = pl_module.progress.step
        if trainer.is_global_zero:
            # what lies here belongs to another run if this one goes on from elsewhere
            self._drop(lambda drawn: drawn >= step or self._earlier is not None)
            self._take_over(step)
        trainer.strategy.barrier("answers of another run")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Drop what is older than every resume point, where a generation may have ended."""
        assert isinstance(pl_module, RwkvModule)
        record = pl_module.finished
        if trainer.is_global_zero and record is not None and record.step % self._steps == 0:
            # a point of the generation before this one may be on its way to the disk
            oldest = min([record.step - self._steps, *self._point_steps()])
            self._drop(lambda drawn: drawn + self._steps <= oldest)

    def _take_over(self, step: int) -> None:
        for path in [] if self._earlier is None else self._earlier.glob("step-*.json"):
            drawn = step_of(path)
            if drawn is not None and step - self._steps < drawn < step:
                write_whole(self._folder / path.name, partial(shutil.copyfile, path))

    def _point_steps(self) -> list[int]:
        found = map(_POINT.search, (path.name for path in self._points.glob("step-*")))
        return [int(match[1]) for match in found if match is not None]

    def _drop(self, unwanted: Callable[[int], bool]) -> None:
        for path in self._folder.glob("step-*.json"):
            drawn = step_of(path)
            if drawn is not None and unwanted(drawn):
                # what cannot be deleted is in nobody's way
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
