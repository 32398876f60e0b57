"""Norms of weights, gradients and steps for each part of the model, in ``parts.jsonl``: what learns, and how fast."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkvpeft.models.names import part_of
from rwkvpeft.training.callbacks.lines import LineFile, keep_lines
from rwkvpeft.training.module import RwkvModule

FILE = "parts.jsonl"


class PartStatistics(pl.Callback):
    """One line every so many optimizer steps: for each part (see ``part_of``) the norm of its gradient before
    clipping, of its weights before the step, of the step itself, and step over weights.

    Devices that train together hold the same numbers, so that the first one looks at its own. During such a step there
    is one more copy of what is trained; activations are gone by then. The figures reach the processor in one transfer.

    Args:
        folder: where the file goes. After a resume it goes on where the resume point stood.
        every: optimizer steps from line to line.
        log: takes the figures of a step, by name, and its number.
        report: takes a line of text.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        log: Callable[[dict[str, Any], int], None],
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__()
        self._file = LineFile(folder / FILE, report)
        self._every = every
        self._log = log
        self._trained: dict[str, nn.Parameter] = {}
        self._before: list[Tensor] = []
        self._norms: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut the file back to the step the run goes on from."""
        assert isinstance(pl_module, RwkvModule)
        if not trainer.is_global_zero:
            return
        named = pl_module.model.named_parameters()
        self._trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        step = pl_module.progress.step
        keep_lines(self._file.path, lambda line: json.loads(line)["step"] <= step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the gradients, which nobody has clipped yet, and remember the weights."""
        assert isinstance(pl_module, RwkvModule)
        if not self._trained or (pl_module.progress.step + 1) % self._every:
            return
        self._before = [parameter.detach().clone() for parameter in self._trained.values()]
        gradients = [parameter.grad for parameter in self._trained.values()]
        self._norms = [_norms(gradients), _norms(self._before)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the line of the step that has just been taken, if it is to have one."""
        assert isinstance(pl_module, RwkvModule)
        if pl_module.finished is None or not self._before:
            return
        after = (parameter.detach() for parameter in self._trained.values())
        moved = _norms(now - before for now, before in zip(after, self._before, strict=True))
        figures = torch.stack([*self._norms, moved]).tolist()
        self._before, self._norms = [], []
        parts = _by_part(list(self._trained), *figures)
        step = pl_module.finished.step
        self._file.write(json.dumps({"step": step, "parts": parts}) + "\n")
        self._log({f"{figure}/{part}": value for part, own in parts.items() for figure, value in own.items()}, step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the file."""
        self._file.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the file."""
        self._file.close()


def _norms(tensors: Iterable[Tensor | None]) -> Tensor:
    """The norm of each tensor, (n,) fp32; 0 for None."""
    found = [None if tensor is None else torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    zero = torch.zeros((), device=next((norm.device for norm in found if norm is not None), None))
    return torch.stack([zero if norm is None else norm for norm in found])


def _by_part(
    names: list[str], gradients: list[float], weights: list[float], steps: list[float]
) -> dict[str, dict[str, float | None]]:
    """Norms of each part's tensors together; None for what is not a number, as an fp16 gradient that overflowed."""
    squares: dict[str, list[float]] = {}
    for name, *norms in zip(names, gradients, weights, steps, strict=True):
        sums = squares.setdefault(part_of(name), [0.0, 0.0, 0.0])
        for index, norm in enumerate(norms):
            sums[index] += norm * norm
    parts: dict[str, dict[str, float | None]] = {}
    for part, sums in squares.items():
        gradient, weight, step = (math.sqrt(total) if math.isfinite(total) else None for total in sums)
        ratio = step / weight if step is not None and weight else None
        parts[part] = {"grad_norm": gradient, "weight_norm": weight, "update_norm": step, "update_ratio": ratio}
    return parts
