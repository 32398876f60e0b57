"""Evaluation while training: held-out loss, the best checkpoint, an early end, forgetting, and what the model says."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from rwkvpeft.atomic import writing
from rwkvpeft.config.groups import EvaluationConfig
from rwkvpeft.data.collate import collator_of
from rwkvpeft.data.datamodule import evaluation_batches
from rwkvpeft.data.prompts import Prompt
from rwkvpeft.data.read_watch import waited
from rwkvpeft.data.rows import RowDataset
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.evaluation import add_up, add_up_own, mean_of
from rwkvpeft.training.callbacks.lines import LineFile, keep_lines, read_records
from rwkvpeft.training.checkpoints import Checkpoints
from rwkvpeft.training.history import EvaluationRecord, History
from rwkvpeft.training.module import RwkvModule
from rwkvpeft.training.optimizers.schedule_free import averaged
from rwkvpeft.training.resting import at_rest
from rwkvpeft.training.step_record import SHOWN_FIGURES, StepRecord

VAL_DATA = "val_data.jsonl"
SAMPLES = "samples.jsonl"

_SHOWN = 60


@dataclass(frozen=True)
class Watched:
    """What a run is watched by. It reads these and trains on none of them.

    ``held_out`` is more of what is trained, ``general`` text of another kind, both as rows of which ``micro_bsz`` are
    worked on at once, ``chunk`` tokens at a time if the rows are longer than memory. The held-out loss is that of the
    run's own objective if it ``is_own``, otherwise that of each token. ``prompts`` are answered by
    ``answer`` before training and at its end, with ``answers_each_time`` at each evaluation.
    """

    held_out: RowDataset | None = None
    general: RowDataset | None = None
    micro_bsz: int = 1
    chunk: int | None = None
    is_own: bool = False
    prompts: Sequence[Prompt] = ()
    answers_each_time: bool = False
    answer: Callable[[Rwkv, str], str] | None = None
    untuned: Callable[[nn.Module], AbstractContextManager[None]] = field(default=lambda model: nullcontext())
    """Inside it the model is the untouched base, for a run that starts from an adapter's file."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to look at."""
        return self.held_out is None and self.general is None and not self.prompts


class Watching(pl.Callback):
    """Evaluates before the first step, as often as the settings say, and at the end.

    ``history`` is what was found so far. It follows from ``val_data.jsonl``, which is cut back to where a resumed run
    goes on, so that such a run ends as an uninterrupted one. Nothing here changes what is trained.

    Args:
        step: optimizer steps that the run has behind it.
        checkpoints: writes ``rwkv-best.pth``.
        waiting: gives a block within which the process waits for data.
    """

    def __init__(
        self,
        watched: Watched,
        config: EvaluationConfig,
        folder: Path,
        step: int,
        checkpoints: Checkpoints,
        report: Callable[[str], None],
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self._watched = watched
        self._waiting = waiting
        self._config = config
        self._folder = folder
        self._checkpoints = checkpoints
        self._report = report
        self._files: list[LineFile] = []
        self._held_out_weight: Tensor | None = None
        records = read_records(folder / VAL_DATA, last_step=step) if step else []
        self.history = History([EvaluationRecord.from_line(line) for line in records])

    @property
    def gives_up(self) -> bool:
        """Whether the held-out loss has failed to fall so often that the run is to end."""
        return 0 < self._config.early_stop <= self.history.without_better

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the files, cut back to where the run goes on; at its very start, look at the untouched base."""
        assert isinstance(pl_module, RwkvModule)
        step = pl_module.progress.step
        if trainer.is_global_zero:
            self._open(step)
        if self._watched.is_empty:
            return
        if step == 0:
            model = pl_module.model
            assert isinstance(model, Rwkv)
            with self._watched.untuned(model):
                self._look(trainer, pl_module, step=0, epoch=pl_module.plan.epoch_begin, answers=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate if that is due after the step that has just been finished, if one has."""
        assert isinstance(pl_module, RwkvModule)
        record = pl_module.finished
        if record is None or self._watched.is_empty:
            return
        ends = trainer.should_stop or _is_last(trainer, pl_module)
        if not (ends or self._is_due(record.step, pl_module)):
            return
        with averaged(trainer.optimizers[0]):
            answers = ends or self._watched.answers_each_time
            found = self._look(trainer, pl_module, step=record.step, epoch=record.epoch, answers=answers)
            if found is not None and found.best:
                self._save_best(trainer, pl_module, record, found)
        if self.gives_up and not ends:
            self._report(f"the held-out loss has not fallen in {self.history.without_better} evaluations: the run ends")
            trainer.should_stop = True

    def _save_best(
        self, trainer: pl.Trainer, module: RwkvModule, record: StepRecord, found: EvaluationRecord
    ) -> None:
        here = trainer.is_global_zero
        with module.sharing.whole(module.model, here=here, frozen_too=self._checkpoints.of_whole_models):
            if here:
                self._checkpoints.save(
                    module.model, name="best", epoch=record.epoch, step=record.step, loss=record.loss,
                    val_loss=found.val_loss,
                )

    def _is_due(self, step: int, module: RwkvModule) -> bool:
        every = self._config.val_steps
        return step % every == 0 if every else module.mini_epoch_done

    def _look(
        self, trainer: pl.Trainer, module: RwkvModule, *, step: int, epoch: int, answers: bool
    ) -> EvaluationRecord | None:
        """Everything there is to look at, in the model as it is now; None if there are no data."""
        model = module.model
        assert isinstance(model, Rwkv)
        found = None
        with at_rest(model, module.seed):
            if self._watched.held_out is not None or self._watched.general is not None:
                began = time.perf_counter()
                held_out, metrics = self._held_out(trainer, module, model)
                general = self._loss(trainer, module, model, self._watched.general)
                cost = time.perf_counter() - began
                found = self.history.add(
                    step=step, epoch=epoch, val_loss=held_out, general_loss=general, t_cost=cost, metrics=metrics
                )
                self._tell(found)
            if answers and (trainer.is_global_zero or module.sharing.splits_weights):
                module.sharing.run(trainer, lambda: self._answer(model, step))
        return found

    def _loss(
        self, trainer: pl.Trainer, module: RwkvModule, model: Rwkv, dataset: RowDataset | None
    ) -> float | None:
        """The mean over all devices, each of which takes every so manieth batch."""
        if dataset is None:
            return None
        mine = self._batches(trainer, module, dataset)
        found = module.sharing.run(trainer, lambda: add_up(model, mine, chunk=self._watched.chunk))
        loss, tokens = _over_devices(trainer, model, found)
        return mean_of(loss, tokens).loss

    def _held_out(
        self, trainer: pl.Trainer, module: RwkvModule, model: Rwkv
    ) -> tuple[float | None, dict[str, float] | None]:
        """The loss, and an objective's further figures."""
        dataset = self._watched.held_out
        if dataset is None or not self._watched.is_own:
            return self._loss(trainer, module, model, dataset), None
        mine = self._batches(trainer, module, dataset)
        whole = self._weight_of(dataset)
        found = module.sharing.run(trainer, lambda: add_up_own(model, mine, module.objective, whole))
        means = dict(zip(found, _over_devices(trainer, model, list(found.values())), strict=True))
        return means.pop("loss"), means

    def _weight_of(self, dataset: RowDataset) -> Tensor:
        """The step weight of all held-out rows together."""
        if self._held_out_weight is None:
            collator = collator_of(dataset)
            weight = sum(collator.weigh([dataset.row(index)]) for index in range(len(dataset)))
            self._held_out_weight = torch.as_tensor(weight, dtype=torch.float64)
        return self._held_out_weight

    def _batches(self, trainer: pl.Trainer, module: RwkvModule, dataset: RowDataset) -> Iterator[Any]:
        batches = evaluation_batches(
            dataset, self._watched.micro_bsz, trainer.global_rank, trainer.world_size,
            equally_many=module.sharing.splits_weights,
        )
        return waited(batches, self._waiting)

    def _tell(self, found: EvaluationRecord) -> None:
        self._write(0, found.line())
        self._report(_line(found, self.history))
        if self.history.alarm_is_new(self._config.general_alarm):
            self._report(
                f"warning: the model forgets: its loss on {self._config.general_data_file} has risen by "
                f"{self.history.forgotten():.4f} nats, --general_alarm is {self._config.general_alarm:g}; a lower "
                "--lr_init, fewer steps, or such text among --data_file helps"
            )

    def _answer(self, model: Rwkv, step: int) -> None:
        if self._watched.answer is None:
            return
        for number, prompt in enumerate(self._watched.prompts):
            text = self._watched.answer(model, prompt.text)
            line = {"step": step, "prompt": prompt.question, "answer": text}
            if prompt.expected:
                line["expected"] = prompt.expected
            self._write(1, line)
            if number == 0:
                more = len(self._watched.prompts) - 1
                rest = f" ({more} more in {self._folder / SAMPLES})" if more else ""
                self._report(f"step {step} answers {_short(prompt.question)} with {_short(text)}{rest}")

    def _open(self, step: int) -> None:
        """Cut the files back; what an earlier run left in this folder goes."""
        for name in (VAL_DATA, SAMPLES):
            path = self._folder / name
            with writing(path):
                if self._watched.is_empty and not step:
                    path.unlink(missing_ok=True)
                if self._watched.is_empty:
                    continue
                self._folder.mkdir(parents=True, exist_ok=True)
                keep_lines(path, lambda line: step > 0 and json.loads(line)["step"] <= step)
                self._files.append(LineFile(path, self._report))

    def _write(self, number: int, line: dict[str, Any]) -> None:
        if self._files:
            self._files[number].write(json.dumps(line, ensure_ascii=False) + "\n")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the files."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the files."""
        self._close()

    def _close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


def _over_devices(trainer: pl.Trainer, model: Rwkv, here: Sequence[float]) -> list[float]:
    """Sums over all devices."""
    device = model.emb.weight.device
    # some accelerators have no fp64
    dtype = torch.float32 if device.type == "mps" else torch.float64
    totals = torch.tensor(here, dtype=dtype, device=device)
    sums: list[float] = trainer.strategy.reduce(totals, reduce_op="sum").tolist()
    return sums


def _is_last(trainer: pl.Trainer, module: RwkvModule) -> bool:
    assert trainer.max_epochs is not None
    return module.run_done or (module.mini_epoch_whole and trainer.current_epoch == trainer.max_epochs - 1)


def _line(found: EvaluationRecord, history: History) -> str:
    parts = []
    if found.val_loss is not None:
        more = f"perplexity {math.exp(min(found.val_loss, 700.0)):.2f}"
        if found.metrics is not None:
            more = ", ".join(f"{name} {found.metrics[name]:.4g}" for name in SHOWN_FIGURES if name in found.metrics)
        parts.append(f"held-out loss {found.val_loss:.4f}, {more}")
        best = history.best
        if found.step and best is not None:
            parts.append("the best so far" if found.best else f"best {best.val_loss:.4f} at step {best.step}")
    if found.general_loss is not None:
        rise = f" ({history.forgotten():+.4f})" if found.step else ""
        parts.append(f"general loss {found.general_loss:.4f}{rise}")
    return f"{f'step {found.step}' if found.step else 'base model'}: {', '.join(parts)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "...")
