"""Training data as Lightning takes it: one loader for each mini-epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytorch_lightning as pl

from rwkvpeft.config.groups import DataConfig, ScheduleConfig
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.data.loader import (
    BatchPlan,
    TrainLoader,
    evaluation_batches,
    require_equal_lengths,
    worker_arguments,
)
from rwkvpeft.data.rows import RowDataset
from rwkvpeft.errors import ContractError

__all__ = ["BatchPlan", "TrainLoader", "TrainingData", "evaluation_batches"]


class TrainingData(pl.LightningDataModule):
    """Batches of a run, mini-epoch by mini-epoch.

    Mini-epoch e of a run holds batches e * E to (e + 1) * E - 1 of each rank, E being ``epoch_steps``. Row j of batch b
    on rank r is the sample at position ((epoch_begin * E + b) * world_size + r) * micro_bsz + j, so samples repeat only
    when all have been drawn, whatever the number of ranks, and a run that begins at mini-epoch ``epoch_begin`` goes on
    behind the ones before it. With ``repeats``, batches that draw the same count as one here. The Trainer needs
    ``reload_dataloaders_every_n_epochs=1``.

    Args:
        dataset: the rows.
        schedule: micro_bsz, accumulate_grad_batches, epoch_steps and epoch_begin are read.
        data: num_workers, persistent_workers and prefetch_factor are read.
        seed: accepted for symmetry with the other parts; the dataset was opened with it.
        repeats: optimizer steps of a mini-epoch that draw the same rows one after another.
    Attributes:
        waiting: gives a block within which this process waits for data; set it before fitting.
    Raises: UserError for rows of different lengths in one batch, or worker flags without workers.
    """

    def __init__(
        self, dataset: RowDataset, *, schedule: ScheduleConfig, data: DataConfig, seed: int, repeats: int = 1
    ) -> None:
        super().__init__()
        require_equal_lengths(dataset, schedule.micro_bsz)
        self.dataset = dataset
        self.schedule = schedule
        self.repeats = repeats
        self._workers = worker_arguments(data)
        self._start_batch = 0
        self._base_epoch: int | None = None
        self._loader: TrainLoader | None = None
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def world_size(self) -> int:
        """Processes that train together; 1 without a Trainer."""
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def epoch_steps(self) -> int:
        """Batches of each rank in a mini-epoch; for ``--epoch_steps 0`` as many as one pass over the rows takes.

        Needs the number of ranks, so before the Trainer is attached it is that of a single process.
        """
        return self.steps_for(self.world_size)

    def steps_for(self, world_size: int) -> int:
        """``epoch_steps`` of a run with that many ranks."""
        batches = -(-self.dataset.pass_rows // (world_size * self.schedule.micro_bsz))
        if self.repeats > 1:
            # a step that draws what another drew needs as many batches
            accumulate = self.schedule.accumulate_grad_batches
            batches = self.repeats * accumulate * -(-batches // accumulate)
        return self.schedule.epoch_steps or batches

    @property
    def start_batch(self) -> int:
        """Batches of each rank that this run had consumed before it was interrupted; set it before fitting."""
        return self._start_batch

    @start_batch.setter
    def start_batch(self, batch: int) -> None:
        if batch < 0:
            raise ContractError(f"a run cannot start at batch {batch}")
        self._start_batch = batch
        self._base_epoch = None

    def train_dataloader(self) -> TrainLoader:
        """The batches of the Trainer's current mini-epoch; of the first one after a resume, those that are left."""
        mini_epoch = self._mini_epoch()
        steps = self.epoch_steps
        begin, end = mini_epoch * steps, (mini_epoch + 1) * steps
        return self._select(max(begin, self._start_batch), end)

    def labels(self, batches: range) -> list[str]:
        """What people find the documents of these batches of the run by, those of all ranks."""
        return self._any_loader().labels(batches)

    def documents(self, batches: range) -> Iterator[tuple[str, TokenBatch]]:
        """The documents of these batches, those of all ranks: what people find each by, and a batch of it alone."""
        return self._any_loader().documents(batches)

    def _any_loader(self) -> TrainLoader:
        return self._loader or TrainLoader(self.dataset, self._plan(), 0, 0)

    def _mini_epoch(self) -> int:
        """The run's mini-epoch, counted from the one that holds ``start_batch``.

        Only the growth of the Trainer's own counter is used: whether a resume restored it makes no difference.
        """
        current = 0 if self.trainer is None else self.trainer.current_epoch
        if self._base_epoch is None:
            self._base_epoch = current
        return self._start_batch // self.epoch_steps + current - self._base_epoch

    def _select(self, begin: int, end: int) -> TrainLoader:
        # one loader for all mini-epochs, or its workers could not stay alive between them
        if self._loader is None or self._loader.plan != self._plan():
            self._loader = TrainLoader(self.dataset, self._plan(), begin, end, **self._workers)
        else:
            self._loader.select(begin, end)
        self._loader.waiting = self.waiting
        return self._loader

    def _plan(self) -> BatchPlan:
        return BatchPlan(
            micro_bsz=self.schedule.micro_bsz,
            epoch_steps=self.epoch_steps,
            accumulate=self.schedule.accumulate_grad_batches,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=self.world_size,
            first_batch=self.schedule.epoch_begin * self.epoch_steps,
            repeats=self.repeats,
        )
