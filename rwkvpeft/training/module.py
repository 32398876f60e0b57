"""The training loop's inside: one micro-batch to a loss, one optimizer step to a record of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkvpeft.adapters.base import Rates
from rwkvpeft.config.groups import OptimizerConfig
from rwkvpeft.data.batches import Batch, TokenBatch
from rwkvpeft.errors import UserError
from rwkvpeft.objectives.base import Objective
from rwkvpeft.training.graphed_step import GraphedStep, Graphs
from rwkvpeft.training.optimizers.contract import find_optimizer
from rwkvpeft.training.optimizers.schedule_free import ScheduleFree
from rwkvpeft.training.parameter_groups import parameter_groups
from rwkvpeft.training.schedules import Schedule, batches_before, steps_per_epoch, weight_decay_at
from rwkvpeft.training.step_guard import StepFigures, StepGuard
from rwkvpeft.training.step_record import StepRecord
from rwkvpeft.training.strategies.contract import Sharing


@dataclass
class RunProgress:
    """How far a run has come. Survives a resume, also one whose rows are split into other batches.

    ``step`` counts optimizer steps, ``rows`` samples and ``tokens`` positions read by all devices, ``seconds`` the
    time spent. ``loss_sum`` and ``weight_sum`` belong to the current mini-epoch: the weighted sum of its tokens' losses
    and their weight. ``loss`` is that of the last step, ``losses`` those of the last hundred steps that were taken;
    ``broken`` steps in a row were left out since.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    loss: float | None = None
    broken: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunPlan:
    """The length of a run, counted from its very start.

    ``epoch_steps`` batches per device make a mini-epoch, ``epoch_count`` mini-epochs the run,
    ``accumulate_grad_batches`` batches an optimizer step; ``rows_at_once`` are the rows of a batch on all devices
    together; ``epoch_begin`` is the number of the first mini-epoch.
    ``last_step`` is the optimizer step that ends the run, if something does before its mini-epochs are over. ``begun``
    mini-epochs have been done by earlier runs, of which this one has the weights alone.
    """

    epoch_steps: int
    epoch_count: int
    accumulate_grad_batches: int
    rows_at_once: int = 1
    epoch_begin: int = 0
    last_step: int | None = None
    begun: int = 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        steps = steps_per_epoch(self.epoch_steps, self.accumulate_grad_batches) * self.epoch_count
        return steps if self.last_step is None else min(steps, self.last_step)

    @property
    def total_batches(self) -> int:
        """Batches of each device in the run."""
        return batches_before(
            self.total_steps, epoch_steps=self.epoch_steps, accumulate_grad_batches=self.accumulate_grad_batches
        )

    @property
    def begun_steps(self) -> int:
        """Optimizer steps of earlier runs."""
        return steps_per_epoch(self.epoch_steps, self.accumulate_grad_batches) * self.begun

    @property
    def ends_by_tokens(self) -> bool:
        """Whether ``last_step`` is the run's last."""
        return self.last_step == self.total_steps

    def batches_in(self, rows: int) -> int:
        """Batches of each device that so many rows of all devices are."""
        return rows // self.rows_at_once

    def group_size(self, batches: int) -> int:
        """Batches of the optimizer step that the batch after ``batches`` of them belongs to."""
        within = batches % self.epoch_steps
        start = within - within % self.accumulate_grad_batches
        return min(self.accumulate_grad_batches, self.epoch_steps - start)

    def ends_group(self, batches: int) -> bool:
        """Whether the optimizer's step follows the batch after ``batches`` of them."""
        within = batches % self.epoch_steps
        return within % self.accumulate_grad_batches + 1 == self.group_size(batches)


class RwkvModule(pl.LightningModule):
    """A model, an objective and the order of optimizer steps.

    Args:
        model: its trainable parameters are fp32.
        schedule: optimizer step to learning rate.
        train_stage: stage of RWKV-LM's pre-training, which has learning-rate factors of its own.
        decay: optimizer step to weight decay; None: as ``optimizer`` says, in a straight line.
        rates: of trained parameters that have their own, by their names in the model.
        after_step: called with the step's number, from 1, and their total while the step's gradients are there; not
            for an fp16 step that overflowed.
        progress: where an earlier run stopped; updated in place.
        seed: of dropout. Each batch draws from its own stream, so that nothing about it must be saved.
        sharing: how several processes share the model and its step.
        guard: looks at every step.
        graphs: what micro-batches are recorded with, to be replayed; None: they are not.
        report: takes a line when they cannot be replayed after all.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        schedule: Schedule,
        optimizer: OptimizerConfig,
        plan: RunPlan,
        progress: RunProgress,
        sharing: Sharing,
        guard: StepGuard,
        seed: int,
        train_stage: int = 0,
        decay: Callable[[int], float] | None = None,
        scaled_gradients: bool = False,
        rates: Callable[[str], Rates | None] | None = None,
        after_step: Callable[[int, int], None] | None = None,
        graphs: Graphs | None = None,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.schedule = schedule
        self.optimizer_config = optimizer
        self.plan = plan
        self.train_stage = train_stage
        self.decay = decay or partial(weight_decay_at, total_steps=plan.total_steps, config=optimizer)
        self.progress = progress
        self.sharing = sharing
        self.guard = guard
        self.seed = seed
        self.scaled_gradients = scaled_gradients
        self.rates = rates
        self.after_step = after_step
        self.finished: StepRecord | None = None
        self.sound = True
        self._clock = 0.0
        self._loss = torch.zeros(())
        self._weight = torch.zeros(())
        self._metrics: dict[str, Tensor] = {}
        self._tokens = 0
        self._mean_loss = self._norm = self._step_weight = math.nan
        self._figures: dict[str, float] = {}
        self._graphed: GraphedStep | None = None
        self._waiting: tuple[tuple[Tensor, ...], int] | None = None
        if graphs is not None:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._graphed = GraphedStep(self._forward_and_backward, trained, graphs, report)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, normalised so that Lightning's sums and means add up to the step's mean.

        Lightning divides by ``accumulate_grad_batches`` and the strategy averages over devices; the normaliser takes
        both back, so that every token of the optimizer step counts the same.
        """
        batches = self.batches
        torch.manual_seed(_mix(self.seed, batches, self.global_rank))
        self.finished = None
        group = self.plan.group_size(batches)
        self.sharing.step_ends(self.trainer, self.plan.ends_group(batches))
        weight = self.trainer.strategy.reduce(batch.step_weight, reduce_op="sum")
        shares = group * self.trainer.world_size
        normaliser = weight.where(weight > 0, 1.0) / shares
        self._weight = weight.flatten()[0]
        self._tokens += batch.positions
        self.progress.rows += self.plan.rows_at_once
        if self._graphed is not None:
            assert isinstance(batch, TokenBatch)
            share = torch.full_like(normaliser, 1 / group)
            self._waiting = (batch.input_ids, batch.labels, batch.weights, normaliser, share), group
            return torch.zeros_like(normaliser)
        loss = self.objective(self.model, batch, normaliser)
        self._add_loss(loss.total.detach(), group)
        for name, value in loss.metrics.items():
            self._metrics[name] = self._metrics.get(name, torch.zeros_like(value)) + value / group
        return loss.total * (self.plan.accumulate_grad_batches / group)

    def _add_loss(self, loss: Tensor, group: int) -> None:
        self._loss = self._loss.to(loss.device) + loss / group

    def _forward_and_backward(
        self, input_ids: Tensor, labels: Tensor, weights: Tensor, normaliser: Tensor, share: Tensor
    ) -> Tensor:
        batch = TokenBatch(input_ids, labels, weights, step_weight=normaliser)
        loss = self.objective(self.model, batch, normaliser).total
        (loss * share).backward()
        return loss.detach()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning clears the gradients just before: a replay, which is forward and backward pass, must come after."""
        if self._graphed is None:
            super().backward(loss, *args, **kwargs)
            return
        assert self._waiting is not None
        batch, group = self._waiting
        self._waiting = None
        self._add_loss(self._graphed(*batch), group)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Replays add to gradients where they are."""
        optimizer.zero_grad(set_to_none=self._graphed is None)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Some accelerators have no fp64; and the sum over devices is made in place, so that it needs a copy."""
        return batch._replace(step_weight=batch.step_weight.to(torch.float32, copy=True))

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over the trained parameters."""
        groups = parameter_groups(
            self.model.named_parameters(),
            layerwise_lr=bool(self.optimizer_config.layerwise_lr),
            weight_decay=self.optimizer_config.weight_decay,
            train_stage=self.train_stage,
            rates=self.rates,
        )
        if not groups:
            raise UserError("nothing would be trained: every parameter is frozen")
        kind = find_optimizer(self.optimizer_config.optim)
        kind.check(self.device.type)
        return kind.build(groups, self.optimizer_config, scaled_gradients=self.scaled_gradients)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Set the learning rate of this step, take it, and keep a record."""
        lr = self.schedule(self.progress.step)
        decay = self.decay(self.progress.step)
        for group in optimizer.param_groups:
            ends = {name: group[name] for name in ("lr_init", "lr_final") if group[name] is not None}
            group["lr"] = self.schedule(self.progress.step, **ends) * group["lr_scale"]
            if group["weight_decay"] > 0 and not group["own_decay"]:
                group["weight_decay"] = decay
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if math.isnan(self._norm):
            self._norm = self.sharing.norm_of_step(self.trainer)
        figures = self._figures_of_step()
        self.guard.look(figures)
        if self.after_step is not None and figures.is_sound:
            self.after_step(figures.step, self.plan.total_steps)
        self._finish_step(figures, lr, decay)
        if self._graphed is None:
            # Lightning would keep the gradients through the next forward pass
            self.optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Measure the norm of all gradients together, clip to it, and find out whether the step is ``sound``."""
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = self.sharing.gradient_norm(trained, gradient_clip_val or math.inf)
        # one transfer for all figures of the step: each would make the processor wait for the device
        loss = self.trainer.strategy.reduce(self._loss, reduce_op="mean").float()
        known = loss.new_tensor(math.nan) if norm is None else norm.float()
        found = [self.trainer.strategy.reduce(value, reduce_op="mean").float() for value in self._metrics.values()]
        figures = torch.stack([loss, known, self._weight.float(), *found]).tolist()
        self._mean_loss, self._norm, self._step_weight = figures[:3]
        self._figures = dict(zip(self._metrics, figures[3:], strict=True))
        self.sound = math.isfinite(self._mean_loss) and (norm is None or math.isfinite(self._norm))
        if self.trainer.world_size > 1:
            # packed rows and batches of similar lengths differ in tokens from device to device
            tokens = torch.tensor(self._tokens, device=self.device)
            self._tokens = int(self.trainer.strategy.reduce(tokens, reduce_op="sum"))

    def _figures_of_step(self) -> StepFigures:
        batches = self.batches
        return StepFigures(
            step=self.progress.step + 1,
            loss=self._mean_loss,
            norm=self._norm,
            batches=range(batches - self.plan.group_size(batches - 1), batches),
            scaled=self.scaled_gradients,
        )

    def _finish_step(self, figures: StepFigures, lr: float, weight_decay: float) -> None:
        loss, norm, weight = figures.loss, figures.norm, self._step_weight
        now = time.perf_counter()
        progress = self.progress
        epoch, last_batch = divmod(self.batches - 1, self.plan.epoch_steps)
        if last_batch < self.plan.accumulate_grad_batches:
            progress.loss_sum = progress.weight_sum = 0.0
        progress.step += 1
        progress.tokens += self._tokens
        progress.seconds += now - self._clock
        if math.isfinite(loss):
            progress.loss_sum += loss * weight
            progress.weight_sum += weight
            progress.loss = loss
        self.finished = StepRecord(
            step=progress.step,
            epoch=self.plan.epoch_begin + epoch,
            loss=loss if math.isfinite(loss) else None,
            lr=lr,
            weight_decay=weight_decay,
            t_cost=now - self._clock,
            grad_norm=norm if math.isfinite(norm) else None,
            tokens=self._tokens,
            weight=weight,
            metrics=self._figures,
        )
        self._metrics = {}
        self._loss = torch.zeros_like(self._loss)
        self._tokens = 0

    @property
    def batches(self) -> int:
        """Batches of this device that are behind the run."""
        return self.plan.batches_in(self.progress.rows)

    @property
    def mini_epoch_done(self) -> bool:
        """Whether the last batch was its mini-epoch's last, or the run's."""
        return self.mini_epoch_whole or self.run_done

    @property
    def mini_epoch_whole(self) -> bool:
        """Whether the last batch was its mini-epoch's last."""
        return self.batches > 0 and self.batches % self.plan.epoch_steps == 0

    @property
    def run_done(self) -> bool:
        """Whether the last step was the run's last."""
        return self.progress.step >= self.plan.total_steps

    def on_train_epoch_start(self) -> None:
        """Start the clock of the first step."""
        self._clock = time.perf_counter()

    def validation_step(self, work: Callable[[], Any]) -> Any:
        """Do ``work`` where the strategy's wrapper around the model expects forward passes, see ``Sharing.run``."""
        return work()

    def on_train_end(self) -> None:
        """Leave the model with the weights that a checkpoint holds."""
        optimizer = self.trainer.optimizers[0]
        if isinstance(optimizer, ScheduleFree):
            optimizer.take_average()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock of the next step, after the callbacks: saving and drawing are not training."""
        if self.finished is not None:
            self._clock = time.perf_counter()


def _mix(seed: int, batch: int, rank: int) -> int:
    """32 well-mixed bits: PyTorch's CPU generator takes no more, and near seeds give near streams (splitmix64)."""
    value = (seed * 0x9E3779B97F4A7C15 + batch * 0xD1B54A32D192ED03 + rank * 0x8CB92BA72F3D8DD7) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return (value ^ value >> 31) % 2**32
