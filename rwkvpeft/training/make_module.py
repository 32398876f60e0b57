"""The training loop's inside, made as the settings want it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rwkvpeft.adapters.base import Adapter, Rates
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.build import build_objective
from rwkvpeft.training.devices import find_device
from rwkvpeft.training.fault_log import FaultLog
from rwkvpeft.training.graphed_step import CudaGraphs, Graphs, why_not
from rwkvpeft.training.module import RunPlan, RunProgress, RwkvModule
from rwkvpeft.training.optimizers.contract import find_optimizer
from rwkvpeft.training.plan import batch_tokens
from rwkvpeft.training.schedules import build_schedule, weight_decay_at
from rwkvpeft.training.step_guard import StepGuard
from rwkvpeft.training.strategies.contract import Sharing
from rwkvpeft.training.suspects import Suspects


def make_module(
    model: Rwkv,
    adapter: Adapter | None,
    config: TrainConfig,
    plan: RunPlan,
    progress: RunProgress,
    sharing: Sharing,
    guard: StepGuard,
    provided: Provided,
    say: Callable[[str], None],
) -> RwkvModule:
    """The Lightning module of a run. ``provided`` is what its objective is made of; ``say`` takes a line."""
    keeps_rate = find_optimizer(config.optimizer.optim).keeps_rate
    if keeps_rate:
        say(f"{config.optimizer.optim}: the learning rate does not fall; --lr_schedule and --lr_final are not used")
    graphs = _graphs(config, model, say)
    return RwkvModule(
        model.train(),
        # to count the rows that are trained would make the processor wait, which no recording can
        build_objective(
            config, replace(provided, compact=graphs is None, adapter=adapter, step=lambda: progress.step)
        ),
        schedule=build_schedule(
            # the data may have told how many mini-epochs the tokens take
            replace(config.schedule, epoch_count=plan.epoch_count),
            epoch_steps=plan.epoch_steps,
            keeps_rate=keeps_rate,
            batch_tokens=batch_tokens(config),
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


def make_guard(
    model: Rwkv, data: TrainingData, config: TrainConfig, progress: RunProgress, sharing: Sharing, faults: FaultLog
) -> StepGuard:
    """What looks at every step of a run."""
    chunk = config.long_context.chunk_ctx if config.long_context.infctx else None
    suspects = Suspects(model, data, sharing, chunk=chunk, seed=config.runtime.random_seed)
    # a policy gradient's loss is about 0 whatever is learned: how far it lies above others says nothing
    spike = 0.0 if config.objective.objective == "grpo" else config.faults.spike
    return StepGuard(progress, skip=config.faults.skip_broken, spike=spike, suspects=suspects, log=faults)


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


def _decay(config: TrainConfig, plan: RunPlan) -> Callable[[int], float]:
    warmup = config.schedule.warmup_steps if config.schedule.lr_schedule == "exp" else None
    return partial(
        weight_decay_at, total_steps=plan.total_steps, config=config.optimizer, exponential_from=warmup
    )
