"""The checkpoints of a run, ``rwkv-{name}.pth``: what they hold, which are kept, and what becomes of a full disk."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.atomic import NotWrittenError
from rwkvpeft.checkpoints.adapter import Recipe, check_finite, recipe_path, save_adapter, save_recipe
from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.errors import UserError
from rwkvpeft.models.names import is_state
from rwkvpeft.training.writer import Writer

_NUMBERED = re.compile(r"rwkv-(step-)?\d+\.pth")


class Checkpoints:
    """Writes ``rwkv-{name}.pth`` with its recipe.

    A file that cannot be written is reported and does not end the run: the one before it stays.

    Args:
        adapter: None saves the whole model, in the dtype it computes in.
        merged_into: the base checkpoint, if the merged model is to be written and the adapter beside it.
        keep: so many of the newest numbered ones stay of those that this run wrote; 0: all.
        writer: does the writing.
        report: takes a line of text.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        adapter: Adapter | None,
        merged_into: Path | None = None,
        *,
        keep: int = 0,
        writer: Writer | None = None,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder = folder
        self._recipe = recipe
        self._adapter = adapter
        self._merged_into = merged_into
        self._keep = keep
        self.writer = writer or Writer()
        self._report = report
        self.written: list[str] = []
        """Numbered files that this run, earlier starts of it included, wrote and did not remove, oldest first."""
        self.owed: dict[str, NotWrittenError] = {}
        """Files that the run should have ended with and could not write, with the reason."""

    @property
    def of_whole_models(self) -> bool:
        """Whether a checkpoint holds what is not trained, too."""
        return self._adapter is None

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
        last: bool = False,
    ) -> None:
        """Write the checkpoint of mini-epoch ``epoch``; a crash leaves an older file whole.

        Args:
            name: in place of the mini-epoch in the file's name.
            val_loss: of held-out data.
            last: the run ends with it.
        Raises: UserError if a tensor is not finite.
        """
        self.writer.begin(step)
        path = self._folder / f"rwkv-{name or epoch}.pth"
        recipe = replace(self._recipe, epoch=epoch, step=step, loss=loss, val_loss=val_loss)
        tensors = whole_model(model) if self._adapter is None else self._adapter.file_tensors(model)
        check_finite(tensors, "the training diverged and is not saved")
        if self.writer.background:
            tensors = {name: _apart(tensor) for name, tensor in tensors.items()}
        device = str(next(model.parameters()).device)
        self.writer.add(lambda: self._try_to_write(path, tensors, recipe, device, last))

    def _try_to_write(
        self, path: Path, tensors: dict[str, Tensor], recipe: Recipe, device: str, last: bool
    ) -> None:
        try:
            self._write_with_room(path, tensors, recipe, device)
        except NotWrittenError as reason:
            if last:
                self.owed[path.name] = reason
            self._report(f"warning: {reason.what} ({reason.found}); training goes on without this checkpoint")
            return
        self.owed.pop(path.name, None)
        if _NUMBERED.fullmatch(path.name):
            self._report(f"saved {path}")
            self.written = [*(name for name in self.written if name != path.name), path.name]
            self._keep_newest(self._keep)
        elif last:
            self._report(f"saved {path}")

    def _write_with_room(self, path: Path, tensors: dict[str, Tensor], recipe: Recipe, device: str) -> None:
        """A disk that has no room for one more than are kept loses the oldest first, if another one stays."""
        try:
            self._write(path, tensors, recipe, device)
        except NotWrittenError:
            if self._keep < 2 or len(self.written) < self._keep or path.name in self.written:
                raise
            self._keep_newest(self._keep - 1)
            self._write(path, tensors, recipe, device)

    def _write(self, path: Path, tensors: dict[str, Tensor], recipe: Recipe, device: str) -> None:
        if self._adapter is None:
            save_recipe(path, recipe)
            save_tensors(path, tensors)
        elif self._merged_into is None:
            save_adapter(path, tensors, recipe)
        else:
            beside = _beside(path)
            save_adapter(beside, tensors, recipe)
            try:
                # where training quantised: another device's program may round a tie the other way
                merge_files(self._merged_into, beside, path, recipe=recipe, device=device)
            except NotWrittenError:
                raise
            except UserError as reason:
                # the adapter is saved: a base that is gone or was changed ends no run
                raise NotWrittenError(f"cannot merge {beside}", found=f"{reason.what}; {reason.found}") from reason

    def _keep_newest(self, number: int) -> None:
        while number and len(self.written) > number:
            path = self._folder / self.written.pop(0)
            # the recipe last: tensors must not stand there without it
            for part in (path, _beside(path), recipe_path(path)):
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-adapter.pth")


def _apart(tensor: Tensor) -> Tensor:
    on_cpu = tensor.detach().cpu()
    return on_cpu.clone() if on_cpu.data_ptr() == tensor.data_ptr() else on_cpu


def whole_model(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a fully trained model under its published name, in the dtype the model computes in."""
    dtype: Any = model.compute_dtype
    return {
        name: tensor.detach() if is_state(name) else tensor.detach().to(dtype)
        for name, tensor in model.state_dict().items()
    }


def of_earlier_runs(folder: Path) -> str | None:
    """What to tell somebody who starts anew in a folder that holds numbered checkpoints."""
    found = [path for path in folder.glob("rwkv-*.pth") if _NUMBERED.fullmatch(path.name)]
    if not found:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return (
        f"{folder} holds {len(found)} checkpoints of an earlier run, the newest is {newest.name}: this one overwrites "
        "those whose numbers it reaches and leaves the others"
    )
