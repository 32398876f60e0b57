"""One call that trains: assembles Lightning's parts around a model, resumes, runs, and says how it ended."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.checkpoints.adapter import Recipe
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.data.file_array import FileChanged
from rwkvpeft.data.read_watch import ReadWatch
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.base import Provided
from rwkvpeft.training.callbacks.data_files import DataFiles
from rwkvpeft.training.callbacks.kept_rollouts import KeptRolloutFiles
from rwkvpeft.training.callbacks.metrics import Metrics
from rwkvpeft.training.callbacks.part_statistics import PartStatistics
from rwkvpeft.training.callbacks.progress import Progress
from rwkvpeft.training.callbacks.rollouts import RolloutLog
from rwkvpeft.training.callbacks.saving import Occasions, Saving, mean_loss, write_owed
from rwkvpeft.training.callbacks.watching import Watched, Watching
from rwkvpeft.training.checkpoints import Checkpoints, of_earlier_runs
from rwkvpeft.training.devices import matmul_precision, place_model
from rwkvpeft.training.essentials import check_essentials, essential_settings, split_of, what_splits_otherwise
from rwkvpeft.training.fault_log import FaultLog
from rwkvpeft.training.history import History
from rwkvpeft.training.make_module import make_guard, make_module
from rwkvpeft.training.module import RunPlan, RunProgress
from rwkvpeft.training.plan import epochs_left, first_progress, run_plan
from rwkvpeft.training.resume import ResumePoint, find_point, restore_parameters, resume_folder
from rwkvpeft.training.speaking import is_first_process, quiet_lightning, spoken_once
from rwkvpeft.training.stopping import StopSignals, end_process
from rwkvpeft.training.strategies.build import build_sharing
from rwkvpeft.training.writer import Writer


@dataclass(frozen=True)
class FitResult:
    """How a run ended: optimizer steps in all, mean loss of the last mini-epoch, whether a signal cut it short, what
    the evaluations found, and whether those ended it."""

    steps: int
    final_loss: float | None
    stopped_early: bool
    history: History = field(default_factory=History)
    gave_up: bool = False


def fit(
    *,
    model: Rwkv,
    adapter: Adapter | None,
    data: TrainingData,
    config: TrainConfig,
    recipe: Recipe,
    report: Callable[[str], None],
    provided: Provided | None = None,
    watched: Watched | None = None,
    begun: int = 0,
    also: Sequence[pl.Callback] = (),
) -> FitResult:
    """Train ``model`` in place, from the newest resume point if the settings say so.

    Args:
        model: the adapter already attached; what requires a gradient is trained.
        adapter: None for full training.
        config: resolved settings.
        recipe: of the checkpoints to write; step, epoch and loss are filled in.
        report: takes each line of text for the user.
        provided: what the objective is made of, beside the adapter and the run's step.
        watched: what the run is watched by; None for nothing.
        begun: mini-epochs that earlier runs have done, with whose weights this one begins.
        also: further callbacks; they come first.
    Raises: UserError if the machine lacks what the settings ask for, a resume point belongs to other settings,
        training diverges, or what the run ends with cannot be written. KeyboardInterrupt after a second Ctrl-C.
    """
    say = spoken_once(report)
    sharing = build_sharing(config)
    _freeze_unread(model)
    precision = config.runtime.precision or "fp32"
    place_model(model, precision)
    plan = run_plan(config, data.steps_for(config.runtime.devices * config.runtime.num_nodes), begun)
    essentials = essential_settings(config, recipe, plan)
    point = _resume(model, config, essentials, say)
    progress = first_progress(config, plan) if point is None else point.progress
    left = epochs_left(config, plan, progress)
    checkpoints = _checkpoints(config, adapter, recipe, say)
    if point is not None and point.is_of(config.output):
        checkpoints.written = list(point.standing.checkpoints)
    reads = _read_watch(config, say)
    watching = Watching(watched or Watched(), config.evaluation, Path(config.output.proj_dir), progress.step,
                        checkpoints, say, reads.waiting)
    faults = FaultLog(Path(config.output.proj_dir), say, is_first_process)
    guard = make_guard(model, data, config, progress, sharing, faults)
    rollouts = RolloutLog(Path(config.output.proj_dir), progress, say)
    provided = replace(provided or Provided(), log=rollouts.write)
    module = make_module(model, adapter, config, plan, progress, sharing, guard, provided, say)
    if left <= 0 or progress.step >= plan.total_steps or watching.gives_up:
        if point is not None and point.standing.owed:
            write_owed(point, module, checkpoints)
        more = "; a larger --early_stop goes on" if watching.gives_up else ""
        say(f"the run in {config.output.proj_dir} is complete; --resume none starts it anew{more}")
        model.eval()
        return FitResult(progress.step, _mean_loss(progress), False, watching.history, watching.gives_up)
    data.start_batch = plan.batches_in(progress.rows)
    data.waiting = reads.waiting
    signals = StopSignals(say)
    saving = _saving(config, checkpoints, plan, essentials, point, say, lambda: signals.asked)
    metrics = Metrics(config.output, asdict(config), say, lambda: watching.history.newest)
    callbacks: list[pl.Callback] = [watching, metrics, Progress(say), saving, DataFiles(data.dataset, say)]
    if config.objective.objective == "grpo":
        callbacks += [rollouts, *_kept_rollouts(config, provided.folder, point)]
    if config.evaluation.log_parts:
        folder = Path(config.output.proj_dir)
        callbacks.insert(2, PartStatistics(folder, config.evaluation.log_parts, metrics.send, say))
    with quiet_lightning(), matmul_precision(precision):
        trainer = pl.Trainer(
            **sharing.trainer_arguments(),
            **_FIXED,
            max_epochs=left,
            accumulate_grad_batches=plan.accumulate_grad_batches,
            gradient_clip_val=config.optimizer.grad_clip or None,
            callbacks=[*also, *callbacks],
            default_root_dir=config.output.proj_dir,
        )
        signals.keep_from(trainer)
        faults.open(progress.step)
        with signals, reads, _in_our_words(progress):
            trainer.fit(module, datamodule=data)
    model.eval()
    saving.conclude()
    if progress.broken:
        say(f"warning: steps left out at the end, as not finite: {progress.broken}; the result may be worth nothing")
    return FitResult(progress.step, _mean_loss(progress), saving.stopped, watching.history, watching.gives_up)


@contextmanager
def _in_our_words(progress: RunProgress) -> Generator[None, None, None]:
    """Give what ends a run from inside Lightning the form that this package's errors have."""
    try:
        yield
    except SystemExit as reason:
        # how Lightning ends after a KeyboardInterrupt
        raise KeyboardInterrupt from reason
    except FileChanged as reason:
        raise UserError(
            f"step {progress.step + 1}: {reason.what}", found=reason.found, expected=reason.expected, fix=reason.fix
        ) from reason


# what Lightning would add of its own: this package has its own files, bar and resume points
_FIXED: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "use_distributed_sampler": False,
    "reload_dataloaders_every_n_epochs": 1,
}


def _read_watch(config: TrainConfig, say: Callable[[str], None]) -> ReadWatch:
    def end(message: str) -> None:
        fix = "look at the file system, then the same command goes on; --read_timeout, in seconds, waits longer"
        end_process(UserError(message, fix=fix).render())

    return ReadWatch(config.data.data_file, say, config.faults.read_timeout, end)


def _resume(
    model: Rwkv, config: TrainConfig, essentials: dict[str, Any], report: Callable[[str], None]
) -> ResumePoint | None:
    point = find_point(config.output, report)
    if point is None:
        others = None if config.schedule.train_stage else of_earlier_runs(Path(config.output.proj_dir))
        if others is not None:
            report(others)
        return None
    check_essentials(point, essentials, config)
    restore_parameters(model, point.tensors())
    report(f"going on from {point.path}")
    remark = what_splits_otherwise(point, config, model)
    if remark is not None:
        report(remark)
    return point


def _checkpoints(
    config: TrainConfig, adapter: Adapter | None, recipe: Recipe, report: Callable[[str], None]
) -> Checkpoints:
    output, merges = config.output, bool(config.method.merge) and adapter is not None
    base = Path(config.model.load_model) if merges else None
    writer = Writer(background=output.save_async)
    return Checkpoints(Path(output.proj_dir), recipe, adapter, base, keep=output.keep, writer=writer, report=report)


def _saving(
    config: TrainConfig,
    checkpoints: Checkpoints,
    plan: RunPlan,
    essentials: dict[str, Any],
    point: ResumePoint | None,
    report: Callable[[str], None],
    asked_to_stop: Callable[[], bool],
) -> Saving:
    return Saving(
        checkpoints,
        resume_folder(config.output),
        essentials,
        Occasions(
            epoch_save=config.output.epoch_save,
            save_steps=config.output.save_steps,
            step_save=config.output.step_save,
            final=plan.ends_by_tokens or (config.schedule.train_stage > 0 and plan.last_step is None),
        ),
        split=split_of(config),
        point=point,
        report=report,
        asked_to_stop=asked_to_stop,
    )


def _kept_rollouts(config: TrainConfig, folder: Path | None, point: ResumePoint | None) -> list[pl.Callback]:
    """What looks after answers that several steps learn from, if they do."""
    steps = config.rewards.policy_steps
    if folder is None or steps == 1:
        return []
    earlier = None if point is None or point.is_of(config.output) else point.path.parent.parent / folder.name
    return [KeptRolloutFiles(folder, resume_folder(config.output), steps, earlier)]


def _freeze_unread(model: Rwkv) -> None:
    """Layer 0 of v7 has a value residual that nothing reads; DDP would wait for its gradients for ever."""
    if model.shape.version == "x070":
        for name in ("v0", "v1", "v2"):
            model.get_parameter(f"blocks.0.att.{name}").requires_grad_(False)


def _mean_loss(progress: RunProgress) -> float | None:
    found = mean_loss(progress)
    return progress.loss if found is None else found
