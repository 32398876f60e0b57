"""One call that trains: assembles Lightning's parts around a model, resumes, runs, and says how it ended."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.utilities.warnings import PossibleUserWarning
from tqdm import tqdm

from rwkvpeft.adapters.base import Adapter, Rates
from rwkvpeft.checkpoints.adapter import Recipe
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.data.file_array import FileChanged
from rwkvpeft.data.read_watch import ReadWatch
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.build import build_objective
from rwkvpeft.ops.cross_entropy import RowChoice
from rwkvpeft.ops.cross_entropy_torch import RowProgram
from rwkvpeft.training.callbacks.data_files import DataFiles
from rwkvpeft.training.callbacks.metrics import Metrics
from rwkvpeft.training.callbacks.part_statistics import PartStatistics
from rwkvpeft.training.callbacks.progress import Progress
from rwkvpeft.training.callbacks.saving import Occasions, Saving, mean_loss, write_owed
from rwkvpeft.training.callbacks.watching import Watched, Watching
from rwkvpeft.training.checkpoints import Checkpoints, of_earlier_runs
from rwkvpeft.training.devices import find_device, matmul_precision, place_model
from rwkvpeft.training.essentials import check_essentials, essential_settings, split_of, what_splits_otherwise
from rwkvpeft.training.fault_log import FaultLog
from rwkvpeft.training.graphed_step import CudaGraphs, Graphs, why_not
from rwkvpeft.training.history import History
from rwkvpeft.training.module import RunPlan, RunProgress, RwkvModule
from rwkvpeft.training.optimizers.contract import find_optimizer
from rwkvpeft.training.resume import ResumePoint, find_point, restore_parameters, resume_folder
from rwkvpeft.training.schedules import build_schedule, steps_per_epoch, steps_to_tokens, weight_decay_at
from rwkvpeft.training.step_guard import StepGuard
from rwkvpeft.training.stopping import StopSignals, end_process
from rwkvpeft.training.strategies.build import build_sharing
from rwkvpeft.training.strategies.contract import Sharing
from rwkvpeft.training.suspects import Suspects
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
    loss_rows: RowChoice | RowProgram = "auto",
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
        loss_rows: what works on the loss's rows of logits.
        watched: what the run is watched by; None for nothing.
        begun: mini-epochs that earlier runs have done, with whose weights this one begins.
        also: further callbacks; they come first.
    Raises: UserError if the machine lacks what the settings ask for, a resume point belongs to other settings,
        training diverges, or what the run ends with cannot be written. KeyboardInterrupt after a second Ctrl-C.
    """
    say = _quietly_shared(report)
    sharing = build_sharing(config)
    _freeze_unread(model)
    precision = config.runtime.precision or "fp32"
    place_model(model, precision)
    plan = run_plan(config, data.steps_for(config.runtime.devices * config.runtime.num_nodes), begun)
    essentials = essential_settings(config, recipe, plan)
    point = _resume(model, config, essentials, say)
    progress = _first_progress(config, plan) if point is None else point.progress
    epochs_left = _epochs_left(config, plan, progress)
    checkpoints = _checkpoints(config, adapter, recipe, say)
    if point is not None and point.is_of(config.output):
        checkpoints.written = list(point.standing.checkpoints)
    reads = _read_watch(config, say)
    watching = Watching(watched or Watched(), config.evaluation, Path(config.output.proj_dir), progress.step,
                        checkpoints, say, reads.waiting)
    faults = FaultLog(Path(config.output.proj_dir), say, _is_first_process)
    guard = _guard(model, data, config, progress, sharing, faults)
    if epochs_left <= 0 or progress.step >= plan.total_steps or watching.gives_up:
        if point is not None and point.standing.owed:
            module = _module(model, adapter, config, plan, progress, sharing, guard, loss_rows, say)
            write_owed(point, module, checkpoints)
        more = "; a larger --early_stop goes on" if watching.gives_up else ""
        say(f"the run in {config.output.proj_dir} is complete; --resume none starts it anew{more}")
        return FitResult(progress.step, _mean_loss(progress), False, watching.history, watching.gives_up)
    data.start_batch = plan.batches_in(progress.rows)
    module = _module(model, adapter, config, plan, progress, sharing, guard, loss_rows, say)
    data.waiting = reads.waiting
    signals = StopSignals(say)
    saving = _saving(config, checkpoints, plan, essentials, point, say, lambda: signals.asked)
    metrics = Metrics(config.output, asdict(config), say, lambda: watching.history.newest)
    callbacks: list[pl.Callback] = [watching, metrics, Progress(say), saving, DataFiles(data.dataset, say)]
    if config.evaluation.log_parts:
        folder = Path(config.output.proj_dir)
        callbacks.insert(2, PartStatistics(folder, config.evaluation.log_parts, metrics.send, say))
    with _quiet_lightning(), matmul_precision(precision):
        trainer = pl.Trainer(
            **sharing.trainer_arguments(),
            **_FIXED,
            max_epochs=epochs_left,
            accumulate_grad_batches=plan.accumulate_grad_batches,
            gradient_clip_val=config.optimizer.grad_clip or None,
            callbacks=[*also, *callbacks],
            default_root_dir=config.output.proj_dir,
        )
        signals.keep_from(trainer)
        faults.open(progress.step)
        try:
            with signals, reads:
                trainer.fit(module, datamodule=data)
        except SystemExit as reason:
            # how Lightning ends after a KeyboardInterrupt
            raise KeyboardInterrupt from reason
        except FileChanged as reason:
            raise UserError(
                f"step {progress.step + 1}: {reason.what}", found=reason.found, expected=reason.expected, fix=reason.fix
            ) from reason
    model.eval()
    saving.conclude()
    if progress.broken:
        say(f"warning: steps left out at the end, as not finite: {progress.broken}; the result may be worth nothing")
    return FitResult(progress.step, _mean_loss(progress), saving.stopped, watching.history, watching.gives_up)


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


def _module(
    model: Rwkv,
    adapter: Adapter | None,
    config: TrainConfig,
    plan: RunPlan,
    progress: RunProgress,
    sharing: Sharing,
    guard: StepGuard,
    loss_rows: RowChoice | RowProgram,
    say: Callable[[str], None],
) -> RwkvModule:
    """The training loop's inside, as the settings want it."""
    keeps_rate = find_optimizer(config.optimizer.optim).keeps_rate
    if keeps_rate:
        say(f"{config.optimizer.optim}: the learning rate does not fall; --lr_schedule and --lr_final are not used")
    graphs = _graphs(config, model, say)
    return RwkvModule(
        model.train(),
        # to count the rows that are trained would make the processor wait, which no recording can
        build_objective(config, compact=graphs is None, rows=loss_rows),
        schedule=build_schedule(
            # the data may have told how many mini-epochs the tokens take
            replace(config.schedule, epoch_count=plan.epoch_count),
            epoch_steps=plan.epoch_steps,
            keeps_rate=keeps_rate,
            batch_tokens=_batch_tokens(config),
            begun=plan.begun_steps,
        ),
        optimizer=config.optimizer,
        plan=plan,
        progress=progress,
        sharing=sharing,
        guard=guard,
        train_stage=config.schedule.train_stage,
        decay=_decay(config, plan),
        seed=config.runtime.random_seed,
        scaled_gradients=config.runtime.precision == "fp16",
        rates=None if adapter is None else _rates(model, adapter).get,
        after_step=None if adapter is None else partial(adapter.after_step, model),
        graphs=graphs,
        report=say,
    )


def _guard(
    model: Rwkv, data: TrainingData, config: TrainConfig, progress: RunProgress, sharing: Sharing, faults: FaultLog
) -> StepGuard:
    chunk = config.long_context.chunk_ctx if config.long_context.infctx else None
    suspects = Suspects(model, data, sharing, chunk=chunk, seed=config.runtime.random_seed)
    return StepGuard(
        progress, skip=config.faults.skip_broken, spike=config.faults.spike, suspects=suspects, log=faults
    )


def _read_watch(config: TrainConfig, say: Callable[[str], None]) -> ReadWatch:
    def end(message: str) -> None:
        fix = "look at the file system, then the same command goes on; --read_timeout, in seconds, waits longer"
        end_process(UserError(message, fix=fix).render())

    return ReadWatch(config.data.data_file, say, config.faults.read_timeout, end)


def _graphs(config: TrainConfig, model: Rwkv, report: Callable[[str], None]) -> Graphs | None:
    if not config.runtime.cuda_graph:
        return None
    reason = why_not(config.runtime, config.data, model, find_device(config.runtime))
    if reason is None:
        return CudaGraphs()
    report(f"--cuda_graph: steps are not replayed: {reason}")
    return None


def _rates(model: Rwkv, adapter: Adapter) -> dict[str, Rates | None]:
    """Rates of the trained parameters by their names in the model; adapters know them by their names in files."""
    names = {id(tensor): name for name, tensor in adapter.trained_tensors(model).items()}
    return {
        name: adapter.rates(names.get(id(parameter), name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def run_plan(config: TrainConfig, epoch_steps: int, begun: int = 0) -> RunPlan:
    """How long a run is whose mini-epochs have ``epoch_steps`` batches, ``begun`` of them done by earlier runs."""
    schedule = config.schedule
    epoch_count = schedule.epoch_count
    last_step = steps_to_tokens(schedule, epoch_steps=epoch_steps, batch_tokens=_batch_tokens(config))
    if last_step is not None:
        per_epoch = steps_per_epoch(epoch_steps, schedule.accumulate_grad_batches)
        epoch_count = min(epoch_count, math.ceil(last_step / per_epoch))
    return RunPlan(
        epoch_steps=epoch_steps,
        epoch_count=max(epoch_count, 0),
        accumulate_grad_batches=schedule.accumulate_grad_batches,
        rows_at_once=_rows_at_once(config),
        epoch_begin=schedule.epoch_begin,
        last_step=last_step,
        begun=begun,
    )


def _first_progress(config: TrainConfig, plan: RunPlan) -> RunProgress:
    """Where a run begins that has not been saved yet."""
    rows = plan.begun * plan.epoch_steps * plan.rows_at_once
    return RunProgress(step=plan.begun_steps, rows=rows, tokens=rows * (config.data.ctx_len or 1))


def _batch_tokens(config: TrainConfig) -> int:
    """Positions of one batch on all devices, as RWKV-LM counts tokens."""
    return _rows_at_once(config) * (config.data.ctx_len or 1)


def _rows_at_once(config: TrainConfig) -> int:
    return config.schedule.micro_bsz * config.runtime.devices * config.runtime.num_nodes


def _decay(config: TrainConfig, plan: RunPlan) -> Callable[[int], float]:
    warmup = config.schedule.warmup_steps if config.schedule.lr_schedule == "exp" else None
    return partial(
        weight_decay_at, total_steps=plan.total_steps, config=config.optimizer, exponential_from=warmup
    )


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


def _epochs_left(config: TrainConfig, plan: RunPlan, progress: RunProgress) -> int:
    epochs = min(plan.epoch_count, config.schedule.my_exit - plan.epoch_begin + 1)
    return math.ceil((epochs * plan.epoch_steps - plan.batches_in(progress.rows)) / plan.epoch_steps)


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


def _freeze_unread(model: Rwkv) -> None:
    """Layer 0 of v7 has a value residual that nothing reads; DDP would wait for its gradients for ever."""
    if model.shape.version == "x070":
        for name in ("v0", "v1", "v2"):
            model.get_parameter(f"blocks.0.att.{name}").requires_grad_(False)


def _mean_loss(progress: RunProgress) -> float | None:
    found = mean_loss(progress)
    return progress.loss if found is None else found


def _quietly_shared(report: Callable[[str], None]) -> Callable[[str], None]:
    """Only the first process speaks, and never into a progress bar."""

    def say(text: str) -> None:
        if _is_first_process():
            with tqdm.external_write_mode():
                report(text)

    return say


def _is_first_process() -> bool:
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


@contextmanager
def _quiet_lightning() -> Generator[None, None, None]:
    """Keep Lightning's advice (workers, devices, loggers) from the user; errors pass."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
        # what DeepSpeed still calls
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        # a block's state has views of its activations, which nothing writes to
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
