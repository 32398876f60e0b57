"""What a run leaves behind about itself: train_log.txt, loss_data.jsonl, loss.png, and Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rwkvpeft.atomic import NotWrittenError, write_whole, writing
from rwkvpeft.config.groups import OutputConfig
from rwkvpeft.errors import UserError
from rwkvpeft.training.callbacks.lines import LineFile, keep_lines, read_records
from rwkvpeft.training.history import EvaluationRecord
from rwkvpeft.training.module import RunProgress, RwkvModule
from rwkvpeft.training.step_record import StepRecord, loss_text

_MOST_POINTS = 2000


class Metrics(pl.Callback):
    """One line per optimizer step, one per mini-epoch, and the curve.

    After a resume the files go on where the resume point stood: later lines, written before a crash, are dropped.
    None of them ends a run when it cannot be written.

    Args:
        settings: the run's settings, for Weights & Biases.
        report: takes a line of text.
        evaluation: tells the newest evaluation, if there is one; a callback before this one makes them.
    """

    def __init__(
        self,
        output: OutputConfig,
        settings: dict[str, Any],
        report: Callable[[str], None],
        evaluation: Callable[[], EvaluationRecord | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._evaluation = evaluation
        self._folder = Path(output.proj_dir)
        self._wandb_project = output.wandb
        self._settings = settings
        self._report = report
        self._steps: LineFile | None = None
        self._epochs = LineFile(self._folder / "train_log.txt", report)
        self._wandb: Any = None
        self._draws = True
        self._told = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the files, cut back to the step the run goes on from."""
        assert isinstance(pl_module, RwkvModule)
        if not trainer.is_global_zero:
            return
        progress, plan = pl_module.progress, pl_module.plan
        steps = self._folder / "loss_data.jsonl"
        with writing(steps):
            self._folder.mkdir(parents=True, exist_ok=True)
        keep_lines(steps, lambda line: json.loads(line)["step"] <= progress.step)
        first_unfinished = plan.epoch_begin + pl_module.batches // plan.epoch_steps
        keep_lines(self._epochs.path, lambda line: int(line.split()[0]) < first_unfinished)
        self._steps = LineFile(steps, self._report)
        if self._wandb_project:
            self._wandb = start_wandb(self._wandb_project, self._folder, self._settings, self._report)
            if figures := self._losses(progress.step):
                self.send(figures, progress.step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step that has just been finished, and the mini-epoch if that was its last."""
        assert isinstance(pl_module, RwkvModule)
        record = pl_module.finished
        if record is None or self._steps is None:
            return
        line = {**_step_line(record), "memory": peak_memory(pl_module.device)}
        self._steps.write(json.dumps(line) + "\n")
        self.send({**line, **self._losses(record.step)}, record.step)
        if pl_module.mini_epoch_done:
            self._finish_epoch(record, pl_module.progress)

    def send(self, figures: dict[str, Any], step: int) -> None:
        """Send further figures of a step to Weights & Biases, if the run is followed there."""
        if self._wandb is not None:
            self._wandb.log(figures, step=step)

    def _losses(self, step: int) -> dict[str, float]:
        """What was evaluated after this step."""
        found = self._evaluation()
        if found is None or found.step != step:
            return {}
        own = {f"val_{name}": value for name, value in (found.metrics or {}).items()}
        figures = {"val_loss": found.val_loss, "general_loss": found.general_loss, **own}
        return {name: value for name, value in figures.items() if value is not None}

    def _finish_epoch(self, record: StepRecord, progress: RunProgress) -> None:
        loss = progress.loss_sum / progress.weight_sum if progress.weight_sum else math.nan
        perplexity = math.exp(min(loss, 700.0))
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        held_out = "".join(f" {name} {value:.6f}" for name, value in self._losses(record.step).items())
        line = f"{record.epoch} {loss:.6f} {perplexity:.4f} {record.lr:.8f} {now} {record.epoch}{held_out}\n"
        self._epochs.write(line)
        more = "" if record.metrics else f", perplexity {perplexity:.2f}"
        self._report(f"mini-epoch {record.epoch} done: loss {loss_text(loss)}{more}")
        self._draw()

    def _draw(self) -> None:
        if not self._draws:
            return
        if find_spec("matplotlib") is None:
            self._draws = False
            self._report("loss.png is not drawn: matplotlib is missing (pip install 'rwkvpeft[plot]')")
            return
        try:
            draw_loss(self._folder / "loss_data.jsonl", self._folder / "loss.png", self._folder / "val_data.jsonl")
        except NotWrittenError as reason:
            if not self._told:
                self._told = True
                self._report(f"warning: {reason.what} ({reason.found}); it is tried again after each mini-epoch")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the files."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the files."""
        self._close()

    def _close(self) -> None:
        self._epochs.close()
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _step_line(record: StepRecord) -> dict[str, Any]:
    line = asdict(record)
    metrics = line.pop("metrics")
    seconds = max(record.t_cost, 1e-9)
    return {
        "step": line.pop("step"),
        "epoch": line.pop("epoch"),
        "loss": line.pop("loss"),
        "lr": line.pop("lr"),
        "t_cost": line.pop("t_cost"),
        "kt_s": record.tokens / seconds / 1000,
        **line,
        **{name: value if math.isfinite(value) else None for name, value in metrics.items()},
        **({"skipped": True} if record.is_left_out else {}),
    }


def peak_memory(device: torch.device) -> int | None:
    """The most bytes this process has held at once so far: tensors on a GPU, otherwise everything in main memory.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if find_spec("resource") is None:
        # Windows
        return None
    resource = import_module("resource")
    # macOS counts bytes, others KiB
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def draw_loss(data: Path, picture: Path, evaluations: Path | None = None) -> None:
    """Draw the losses of a ``loss_data.jsonl``, thinned out to their means where there are many, and with them the
    held-out losses of a ``val_data.jsonl``, if there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = thinned([(line["step"], line["loss"]) for line in read_records(data) if line["loss"] is not None])
    held_out = read_records(evaluations) if evaluations is not None else []
    points = [(line["step"], line["val_loss"]) for line in held_out if line["val_loss"] is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss", title="training loss")
    axes.plot(steps, losses, label="training")
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label="held out")
        axes.set_title("loss")
        axes.legend()
    axes.grid(alpha=0.3)
    write_whole(picture, lambda partial: figure.savefig(partial, format="png", dpi=120))


def thinned(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and values, of which neighbours are replaced by their mean where there are more than a picture shows."""
    width = max(1, math.ceil(len(points) / _MOST_POINTS))
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [group[-1][0] for group in groups], [sum(value for _, value in group) / len(group) for group in groups]


def start_wandb(project: str, folder: Path, settings: dict[str, Any], report: Callable[[str], None]) -> Any:
    """Begin a run on Weights & Biases, offline if no key is known; a login prompt never appears.

    Raises: UserError if the package is missing.
    """
    if find_spec("wandb") is None:
        raise UserError("--wandb needs the package wandb", fix="pip install 'rwkvpeft[wandb]'")
    wandb = import_module("wandb")
    try:
        known = _wandb_key_is_known(wandb)
        reason = "no key is known (wandb login)"
    except wandb.Error as problem:
        known, reason = False, str(problem)
    if not known:
        report(f"Weights & Biases: {reason}; the run is kept offline, wandb sync sends it later")
    return wandb.init(
        project=project, dir=str(folder), config=settings, mode=None if known else "offline", save_code=False
    )


def _wandb_key_is_known(wandb: Any) -> bool:
    """Look in the environment, the netrc file and wandb's own settings; ask nobody."""
    if "prompt" in signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return bool(wandb.api.api_key)
