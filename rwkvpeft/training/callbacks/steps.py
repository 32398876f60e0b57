"""Where the training loop is, in words, for whoever has to tell why a run broke off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from rwkvpeft.training.module import RwkvModule


class NoteSteps(pl.Callback):
    """Hands the step that is being done to ``note``; comes before all other callbacks."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch of the next step begins."""
        assert isinstance(pl_module, RwkvModule)
        self._note(f"computing step {pl_module.progress.step + 1}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What follows a micro-batch is the other callbacks' work, then reading the next one."""
        assert isinstance(pl_module, RwkvModule)
        self._note(f"saving, evaluating or reading data after step {pl_module.progress.step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The loop is left."""
        self._note("ending")
