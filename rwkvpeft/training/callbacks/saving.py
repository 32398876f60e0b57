"""Checkpoints, resume points, and the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.checkpoints.adapter import Recipe, check_finite, save_adapter, save_recipe
from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.models.names import is_state
from rwkvpeft.training.module import RwkvModule
from rwkvpeft.training.optimizers.schedule_free import averaged
from rwkvpeft.training.resume import (
    ResumePoint,
    capture,
    prune_points,
    restored_scaler,
    save_point,
)


class Checkpoints:
    """Writes ``rwkv-{name}.pth`` with its recipe.

    Args:
        adapter: None saves the whole model, in the dtype it computes in.
        merged_into: the base checkpoint, if the merged model is to be written and the adapter beside it.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, adapter: Adapter | None, merged_into: Path | None = None
    ) -> None:
        self._folder = folder
        self._recipe = recipe
        self._adapter = adapter
        self._merged_into = merged_into

    def constants(self, model: nn.Module) -> dict[str, Tensor]:
        """What going on needs beside the trained tensors."""
        return {} if self._adapter is None else self._adapter.constants(model)

    def save(
        self,
        model: nn.Module,
        *,
        epoch: int,
        step: int,
        loss: float | None,
        name: str = "",
        val_loss: float | None = None,
    ) -> Path:
        """Write the checkpoint of mini-epoch ``epoch``; a crash leaves an older file whole.

        Args:
            name: in place of the mini-epoch in the file's name.
            val_loss: of held-out data.
        Raises: UserError if a tensor is not finite or a file cannot be written.
        """
        name = name or str(epoch)
        recipe = replace(self._recipe, epoch=epoch, step=step, loss=loss, val_loss=val_loss)
        path = self._folder / f"rwkv-{name}.pth"
        if self._adapter is None:
            tensors = whole_model(model)
            check_finite(tensors, "the training diverged and is not saved")
            save_recipe(path, recipe)
            save_tensors(path, tensors)
        elif self._merged_into is None:
            save_adapter(path, self._adapter.file_tensors(model), recipe)
        else:
            beside = self._folder / f"rwkv-{name}-adapter.pth"
            save_adapter(beside, self._adapter.file_tensors(model), recipe)
            # where training quantised: another device's program may round a tie the other way
            device = next(model.parameters()).device
            merge_files(self._merged_into, beside, path, recipe=recipe, device=str(device))
        return path


def whole_model(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a fully trained model under its published name, in the dtype the model computes in."""
    dtype: Any = model.compute_dtype
    return {
        name: tensor.detach() if is_state(name) else tensor.detach().to(dtype)
        for name, tensor in model.state_dict().items()
    }


class Saving(pl.Callback):
    """Decides after each optimizer step what is written, and ends the run where its plan or a signal says so.

    Args:
        essentials: settings a resumed run must share.
        final: ``rwkv-final.pth`` is written at the end of the run.
        epoch_save: a checkpoint every so many mini-epochs; the last one always; 0 for the last one only.
        save_steps: a resume point also every so many optimizer steps; 0 for each mini-epoch only.
        point: where the run goes on from.
        asked_to_stop: tells whether somebody wants the run to end after this step.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        folder: Path,
        essentials: dict[str, Any],
        *,
        final: bool = False,
        epoch_save: int,
        save_steps: int,
        point: ResumePoint | None,
        report: Callable[[str], None],
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self._checkpoints = checkpoints
        self._folder = folder
        self._essentials = essentials
        self._final = final
        self._epoch_save = epoch_save
        self._save_steps = save_steps
        self._point = point
        self._report = report
        self._written = [] if point is None else [point.path]
        self._asked_to_stop = asked_to_stop
        self.stopped = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the optimizer its state of an earlier run, and clear up after a crash."""
        assert isinstance(pl_module, RwkvModule)
        if trainer.is_global_zero:
            for partial in self._folder.parent.glob(".*.partial-*"):
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
        record = pl_module.finished
        if record is None:
            return
        # all devices stop at the same step, whichever of them got the signal
        stop = trainer.strategy.reduce_boolean_decision(self._asked_to_stop(), all=False)
        done = pl_module.mini_epoch_done
        if pl_module.mini_epoch_whole and self._checkpoint_is_due(trainer, pl_module):
            self._save(trainer, pl_module)
        if self._final and pl_module.run_done:
            self._save(trainer, pl_module, name="final")
        # another callback may have ended the run
        if stop or done or trainer.should_stop or (self._save_steps > 0 and record.step % self._save_steps == 0):
            self._save_point(trainer, pl_module)
        if stop:
            self.stopped = record.step < pl_module.plan.total_steps
        if stop or pl_module.run_done:
            trainer.should_stop = True

    def _save(self, trainer: pl.Trainer, module: RwkvModule, name: str = "") -> None:
        record = module.finished
        assert record is not None
        here = trainer.is_global_zero
        with averaged(trainer.optimizers[0]), module.sharing.whole(module.model, here=here):
            if here:
                path = self._checkpoints.save(
                    module.model, epoch=record.epoch, step=record.step, loss=_epoch_loss(module), name=name
                )
                self._report(f"saved {path}")

    def _checkpoint_is_due(self, trainer: pl.Trainer, module: RwkvModule) -> bool:
        index = module.batches // module.plan.epoch_steps - 1
        assert trainer.max_epochs is not None
        last = trainer.current_epoch == trainer.max_epochs - 1
        return last or (self._epoch_save > 0 and index % self._epoch_save == 0)

    def _save_point(self, trainer: pl.Trainer, module: RwkvModule) -> None:
        here = trainer.is_global_zero
        moments = module.sharing.moments(module.model, trainer.optimizers[0], here=here)
        with module.sharing.whole(module.model, here=here):
            if here:
                constants = self._checkpoints.constants(module.model)
                tensors = capture(module.model, moments, trainer.precision_plugin.state_dict(), constants)
                place = save_point(self._folder, tensors, module.progress, self._essentials)
                self._written = [path for path in self._written if path != place] + [place]
                prune_points(self._folder, self._written)
        trainer.strategy.barrier("resume point")


def _epoch_loss(module: RwkvModule) -> float | None:
    progress = module.progress
    return progress.loss_sum / progress.weight_sum if progress.weight_sum else None
