"""Data files that are put in the place of those a run reads."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl

from rwkvpeft.data.rows import RowDataset


class DataFiles(pl.Callback):
    """Says at the begin of a mini-epoch that a file has been replaced; the run goes on with the one it has open.

    Args:
        report: takes a line of text.
    """

    def __init__(self, rows: RowDataset, report: Callable[[str], None]) -> None:
        super().__init__()
        self._rows = rows
        self._report = report
        self._told: set[str] = set()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look once for each mini-epoch."""
        for name in self._rows.replaced():
            if name not in self._told:
                self._told.add(name)
                self._report(
                    f"warning: {name} is another file now; this run goes on with the one it has opened, and cannot be "
                    "taken up again with the new one"
                )
