"""When checkpoints and resume points are written, and where a run ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from rwkvpeft.atomic import NotWrittenError
from rwkvpeft.checkpoints.adapter import check_finite
from rwkvpeft.errors import UserError
from rwkvpeft.training.checkpoints import Checkpoints
from rwkvpeft.training.module import RunProgress, RwkvModule
from rwkvpeft.training.optimizers.contract import find_optimizer
from rwkvpeft.training.optimizers.schedule_free import averaged
from rwkvpeft.training.point_order import next_start
from rwkvpeft.training.resume import (
    ResumePoint,
    Standing,
    capture,
    parameters_in,
    replace_points,
    restored_scaler,
    save_point,
    settle,
)


@dataclass(frozen=True)
class Occasions:
    """When something is written.

    ``final``: ``rwkv-final.pth`` at the end of the run. ``epoch_save``: a checkpoint every so many mini-epochs, the
    last one always; 0 for the last one only. ``step_save``: a checkpoint also every so many optimizer steps, and
    ``save_steps``: a resume point; 0 for none but those of mini-epochs.
    """

    epoch_save: int
    save_steps: int = 0
    step_save: int = 0
    final: bool = False


class Saving(pl.Callback):
    """Decides after each optimizer step what is written, and ends the run where its plan or a signal says so.

    What cannot be written, on a full disk or in a folder that is gone, is reported each time and tried again at the
    next occasion; only a run that cannot write what it ends with fails (``conclude``).

    Args:
        folder: of the resume points.
        essentials: settings a resumed run must share.
        split: how rows are dealt out.
        point: where the run goes on from.
        asked_to_stop: tells whether somebody wants the run to end after this step.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        folder: Path,
        essentials: Mapping[str, Any],
        occasions: Occasions,
        *,
        split: Mapping[str, Any],
        point: ResumePoint | None,
        report: Callable[[str], None],
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self._checkpoints = checkpoints
        self._writer = checkpoints.writer
        self._folder = folder
        self._essentials = essentials
        self._occasions = occasions
        self._split = split
        self._point = point
        self._report = report
        self._written = [] if point is None else [point.path]
        self._start = 0
        self._lost: NotWrittenError | None = None
        self._asked_to_stop = asked_to_stop
        self.stopped = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the optimizer its state of an earlier run, and clear up after a crash.

        Raises: UserError if the processes do not stand at the same step.
        """
        assert isinstance(pl_module, RwkvModule)
        _check_together(trainer, pl_module)
        if trainer.is_global_zero:
            self._start = next_start(self._folder)
            for partial in self._folder.parent.glob(".*.partial-*"):
                # what cannot be removed is in nobody's way
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
        if self._point is not None:
            tensors = self._point.tensors()
            pl_module.sharing.load_moments(pl_module.model, trainer.optimizers[0], tensors)
            plugin = trainer.precision_plugin
            plugin.load_state_dict(restored_scaler(tensors, plugin.state_dict()))
            self._point = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due after the step that has just been finished, if one has."""
        assert isinstance(pl_module, RwkvModule)
        self._writer.look()
        record = pl_module.finished
        if record is None:
            return
        # all devices stop at the same step, whichever of them got the signal
        stop = trainer.strategy.reduce_boolean_decision(self._asked_to_stop(), all=False)
        whole, done, occasions = pl_module.mini_epoch_whole, pl_module.run_done, self._occasions
        # before that of the mini-epoch, which --keep 1 is to leave
        if _falls_on(occasions.step_save, record.step):
            self._save(trainer, pl_module, name=f"step-{record.step}")
        if whole and self._checkpoint_is_due(trainer, pl_module):
            self._save(trainer, pl_module, last=self._is_last(trainer))
        if occasions.final and done:
            self._save(trainer, pl_module, name="final", last=True)
        # another callback may have ended the run
        ends = stop or trainer.should_stop
        if whole or done or ends or _falls_on(occasions.save_steps, record.step):
            self._save_point(trainer, pl_module, last=ends and not done)
        if stop:
            self.stopped = record.step < pl_module.plan.total_steps
        if stop or done:
            trainer.should_stop = True

    def _save(self, trainer: pl.Trainer, module: RwkvModule, name: str = "", *, last: bool = False) -> None:
        record = module.finished
        assert record is not None
        here = trainer.is_global_zero
        whole = module.sharing.whole(module.model, here=here, frozen_too=self._checkpoints.of_whole_models)
        with averaged(trainer.optimizers[0]), whole:
            if here:
                self._checkpoints.save(
                    module.model, epoch=record.epoch, step=record.step, loss=mean_loss(module.progress), name=name,
                    last=last,
                )

    def _checkpoint_is_due(self, trainer: pl.Trainer, module: RwkvModule) -> bool:
        index = module.batches // module.plan.epoch_steps - 1
        return self._is_last(trainer) or _falls_on(self._occasions.epoch_save, index)

    @staticmethod
    def _is_last(trainer: pl.Trainer) -> bool:
        """Whether the mini-epoch is the run's last."""
        assert trainer.max_epochs is not None
        return trainer.current_epoch == trainer.max_epochs - 1

    def _save_point(self, trainer: pl.Trainer, module: RwkvModule, *, last: bool) -> None:
        here = trainer.is_global_zero
        if here:
            self._writer.begin(module.progress.step)
        moments = module.sharing.moments(module.model, trainer.optimizers[0], here=here)
        with module.sharing.whole(module.model, here=here):
            if here:
                constants = self._checkpoints.constants(module.model)
                scaler = trainer.precision_plugin.state_dict()
                apart = self._writer.background
                tensors = capture(module.model, moments, scaler, constants, apart=apart)
                # it would take the place of a point that can be gone on from
                check_finite(parameters_in(tensors), "the training diverged and is not saved")
                progress = replace(module.progress)
                self._writer.add(lambda: self._write_point(tensors, progress, last))
        trainer.strategy.barrier("resume point")

    def _write_point(self, tensors: dict[str, Tensor], progress: RunProgress, last: bool) -> None:
        standing = Standing(
            progress,
            self._essentials,
            self._split,
            checkpoints=tuple(self._checkpoints.written),
            owed=tuple(self._checkpoints.owed),
            start=self._start,
        )
        try:
            self._written = replace_points(
                self._folder, self._written, lambda: save_point(self._folder, tensors, standing)
            )
        except NotWrittenError as reason:
            self._report(f"warning: {reason.what} ({reason.found}); training goes on. {self._newest_point()}")
            if last:
                self._lost = reason

    def _newest_point(self) -> str:
        return f"the newest resume point is {self._written[-1]}" if self._written else "there is no resume point yet"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait until all is written."""
        self._writer.wait()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait until all is written, unless somebody wants to end at once."""
        if not isinstance(exception, KeyboardInterrupt):
            # the first reason counts
            with contextlib.suppress(Exception):
                self._writer.wait()

    def conclude(self) -> None:
        """Raises: UserError if the run could not write what it should have ended with."""
        lost = [*self._checkpoints.owed.values(), self._lost]
        reason = next((reason for reason in lost if reason is not None), None)
        if reason is not None:
            raise UserError(
                f"{reason.what}: the run ended without it",
                found=reason.found,
                expected=self._newest_point(),
                fix="make room, or the folder writable, and give the same command again",
            ) from reason


def _falls_on(every: int, number: int) -> bool:
    return every > 0 and number % every == 0


def _check_together(trainer: pl.Trainer, module: RwkvModule) -> None:
    """Raises: UserError if the processes do not stand at the same step: each looked for the resume point itself."""
    steps = module.all_gather(torch.tensor(module.progress.step, device=module.device))
    assert isinstance(steps, Tensor)
    found = sorted(set(steps.flatten().tolist()))
    if len(found) > 1:
        raise UserError(
            "the processes of this run found different resume points",
            found="steps " + ", ".join(str(step) for step in found),
            expected="one --proj_dir that all machines share",
        )


def mean_loss(progress: RunProgress) -> float | None:
    """The mean over the mini-epoch so far; None if nothing of it was trained."""
    return progress.loss_sum / progress.weight_sum if progress.weight_sum else None


def write_owed(point: ResumePoint, module: RwkvModule, checkpoints: Checkpoints) -> None:
    """Write what a run that is complete could not end with, on the first process.

    Raises: UserError if it cannot be written now either.
    """
    if getattr(rank_zero_only, "rank", 0):
        return
    progress, plan = point.progress, module.plan
    as_saved: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if find_optimizer(module.optimizer_config.optim).keeps_rate:
        optimizer = module.configure_optimizers()
        module.sharing.load_moments(module.model, optimizer, point.tensors())
        as_saved = averaged(optimizer)
    epoch = plan.epoch_begin + (module.batches - 1) // plan.epoch_steps
    with as_saved:
        for name in point.standing.owed:
            label = name.removeprefix("rwkv-").removesuffix(".pth")
            checkpoints.save(module.model, epoch=epoch, step=progress.step, loss=mean_loss(progress), name=label,
                             last=True)
    checkpoints.writer.wait()
    for reason in checkpoints.owed.values():
        raise reason
    settle(point)
