"""Rows become batches: which rows, in what order, on which rank. B rows, T tokens.

Everything follows from the number of a batch, so any number of workers gives the same batches and a run can go on
from any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.data.buckets import Buckets
from rwkvpeft.data.collate import TokenCollator, Weight, collator_of
from rwkvpeft.data.pair_batches import PairCollator, preferred
from rwkvpeft.data.read_watch import waited
from rwkvpeft.data.row import Row, apart
from rwkvpeft.data.rows import DocumentDataset, RowDataset
from rwkvpeft.data.workers import leave_signals, made, worker_died
from rwkvpeft.errors import ContractError, UserError


@dataclass(frozen=True)
class BatchPlan:
    """How one rank's batches are laid over the positions of a run.

    Attributes:
        micro_bsz: rows of a batch.
        epoch_steps: batches of this rank in a mini-epoch.
        accumulate: batches of an optimizer step; counting starts anew with each mini-epoch, so that its last step may
            have fewer.
        rank, world_size: this process among all that train together.
        first_batch: batches that earlier runs drew before batch 0 of this one; whole mini-epochs.
        repeats: optimizer steps, one behind another within a mini-epoch, that draw the same rows.
    """

    micro_bsz: int
    epoch_steps: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    first_batch: int = 0
    repeats: int = 1

    def positions(self, batch: int) -> range:
        """The positions of a batch's rows; the ranks' batches of one number lie side by side, and none is left out.
        """
        number = self._number(self.first_batch) + self._number(batch)
        start = (number * self.world_size + self.rank) * self.micro_bsz
        return range(start, start + self.micro_bsz)

    def _number(self, batch: int) -> int:
        """The number of a batch among those that differ: later steps draw what the first of their ``repeats`` did."""
        at_once = self.repeats * self.accumulate
        epoch, within = divmod(batch, self.epoch_steps)
        whole, rest = divmod(self.epoch_steps, at_once)
        in_epoch = whole * self.accumulate + min(rest, self.accumulate)
        return epoch * in_epoch + within // at_once * self.accumulate + within % self.accumulate

    def groups(self, begin: int, end: int) -> list[Group]:
        """The optimizer steps that batches ``begin`` to ``end`` - 1 belong to, cut to those batches."""
        groups: list[Group] = []
        batch = begin
        while batch < end:
            epoch_start = batch - batch % self.epoch_steps
            start = batch - (batch - epoch_start) % self.accumulate
            stop = min(start + self.accumulate, epoch_start + self.epoch_steps)
            groups.append(Group(start, stop, batch, min(stop, end)))
            batch = stop
        return groups


class Group(NamedTuple):
    """The batches ``start`` to ``stop`` - 1 share an optimizer step; ``begin`` to ``end`` - 1 of them are wanted."""

    start: int
    stop: int
    begin: int
    end: int


class TrainLoader:
    """The batches ``begin`` to ``end`` - 1 of a run; can be iterated over again, and be given another range.

    Args:
        workers: arguments of torch's DataLoader: num_workers, persistent_workers, prefetch_factor, and so on.
    Attributes:
        waiting: gives a block within which this process waits for data.
    Raises: UserError for rows of different lengths in one batch; in its loop also for data that cannot be read.
    """

    def __init__(self, dataset: RowDataset, plan: BatchPlan, begin: int, end: int, **workers: Any) -> None:
        require_equal_lengths(dataset, plan.micro_bsz)
        self.plan = plan
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        self._order: list[Group] = []
        self.select(begin, end)
        # arrays travel from workers through pipes: no shared memory to run out of, no file handle for each tensor
        self._steps = _Steps(dataset, plan)
        self._loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=self._order,
            collate_fn=_as_it_is,
            # a generator of its own: the global one would differ between a resumed run and one that went through
            generator=torch.Generator(),
            worker_init_fn=leave_signals if workers.get("num_workers") else None,
            **workers,
        )

    def select(self, begin: int, end: int) -> None:
        """Go on with another range of batches."""
        if not 0 <= begin <= end:
            raise ContractError(f"batches {begin} to {end} are no range")
        self._length = end - begin
        self._order[:] = self.plan.groups(begin, end)

    def labels(self, batches: range) -> list[str]:
        """What people find the documents of these batches by, those of all ranks. Nothing is read."""
        return [label for position in self._places(batches) for label in self._steps.labels(position)]

    def documents(self, batches: range) -> Iterator[tuple[str, TokenBatch]]:
        """The documents of these batches, those of all ranks: what people find each by, and a batch of it alone. Of a
        pair it is the prompt with the chosen answer."""
        for position in self._places(batches):
            row = self._steps.draw(position)
            if isinstance(self._steps.collator, PairCollator):
                # its answers lie side by side: read like that they would know nothing of the prompt
                row = preferred(row)
            labels = self._steps.labels(position)
            if row.lengths is None or len(labels) > 1:
                collator = TokenCollator("alone")
                rows = [row] if row.lengths is None else apart(row)
            else:
                # one document that is packed: what belongs to a prompt
                collator, rows = TokenCollator("packed"), [row]
            for label, alone in zip(labels, rows, strict=True):
                yield label, cast(TokenBatch, collator.batch(collator.join([alone]), collator.weigh([alone])))

    def _places(self, batches: range) -> Iterator[int]:
        for batch in batches:
            for rank in range(self.plan.world_size):
                yield from replace(self.plan, rank=rank).positions(batch)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        try:
            for rows_of_batches, step_weight in self._groups():
                for rows in rows_of_batches:
                    yield self._steps.collator.batch(rows, step_weight)
        except RuntimeError as reason:
            death = worker_died(reason)
            if death is None:
                raise
            raise death from reason

    def _groups(self) -> Iterator[tuple[list[Row], Weight]]:
        with self.waiting():
            groups = iter(self._loader)
        for found in waited(groups, self.waiting):
            if isinstance(found, UserError):
                raise found
            yield found


def worker_arguments(config: DataConfig) -> dict[str, Any]:
    """Arguments of ``TrainLoader`` from the flags. Raises: UserError for a flag that needs workers without any."""
    if config.num_workers == 0:
        for name in ("persistent_workers", "prefetch_factor"):
            if getattr(config, name):
                raise UserError(
                    f"--{name} has no effect without data workers",
                    found="--num_workers 0",
                    fix=f"--num_workers 2, or leave --{name} out",
                )
        return {}
    return {
        "num_workers": config.num_workers,
        "persistent_workers": config.persistent_workers,
        "prefetch_factor": config.prefetch_factor,
    }


def evaluation_batches(
    dataset: RowDataset, micro_bsz: int, rank: int = 0, world_size: int = 1, *, equally_many: bool = False
) -> Iterator[Any]:
    """All rows once, in the file's order, or by length where they are padded to the longest of a batch; the last batch
    may be short. ``step_weight`` is that of the batch alone.

    Args:
        rank: takes batches ``rank``, ``rank`` + ``world_size`` and so on, and reads no others.
        equally_many: a rank that would get one batch fewer than others takes the first one without weight beside its
            own.

    Raises: UserError for rows of different lengths in one batch.
    """
    require_equal_lengths(dataset, micro_bsz)
    collator = collator_of(dataset)
    order = range(len(dataset))
    if isinstance(dataset, DocumentDataset) and dataset.joining == "padded":
        order = np.argsort(dataset.lengths, kind="stable").tolist()
    for start in range(rank * micro_bsz, len(order), world_size * micro_bsz):
        rows = [dataset.row(index) for index in order[start : start + micro_bsz]]
        yield collator.batch(collator.join(rows), collator.weigh(rows))
    batches = -(-len(order) // micro_bsz)
    if equally_many and batches % world_size and rank >= batches % world_size:
        rows = [row._replace(weights=np.zeros_like(row.weights)) for row in map(dataset.row, order[:micro_bsz])]
        yield collator.batch(collator.join(rows), 0 * collator.weigh(rows))


def require_equal_lengths(dataset: RowDataset, micro_bsz: int) -> None:
    """Raises: UserError if rows that differ in length would have to share a batch."""
    if dataset.joining == "alone" and micro_bsz != 1:
        raise UserError(
            "--dataload only needs --micro_bsz 1, for its rows differ in length",
            found=f"--micro_bsz {micro_bsz}",
            fix="--micro_bsz 1 with --accumulate_grad_batches for larger steps, or --dataload pad",
        )


class _Steps(Dataset[tuple[list[Row], Weight] | UserError]):
    """What workers make: the stacked rows of the wanted batches of a group, and the weight of the whole group."""

    def __init__(self, dataset: RowDataset, plan: BatchPlan) -> None:
        self.dataset = dataset
        self.plan = plan
        self.collator = collator_of(dataset)
        self._buckets: Buckets | None = None
        if isinstance(dataset, DocumentDataset) and dataset.joining == "padded":
            self._buckets = Buckets(dataset, plan.micro_bsz * plan.world_size)

    def __getitem__(self, group: Group) -> tuple[list[Row], Weight] | UserError:
        return made(lambda: self._make(group))

    def _make(self, group: Group) -> tuple[list[Row], Weight]:
        rows = {
            batch: [self.draw(position) for position in self.plan.positions(batch)]
            for batch in range(group.start, group.stop)
        }
        step_weight = sum(self.collator.weigh(batch) for batch in rows.values())
        return [self.collator.join(rows[batch]) for batch in range(group.begin, group.end)], step_weight

    def draw(self, position: int) -> Row:
        """The row at a position of the run."""
        if self._buckets is not None:
            return self.dataset.row(self._buckets.index(position))
        return self.dataset.sample(position)

    def labels(self, position: int) -> list[str]:
        """What people find the documents at a position of the run by."""
        if self._buckets is not None:
            assert isinstance(self.dataset, DocumentDataset)
            return [self.dataset.label(self._buckets.index(position))]
        return self.dataset.labels(position)


def _as_it_is(item: Any) -> Any:
    return item
