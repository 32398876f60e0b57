"""AdamW without a schedule of the learning rate: the weights that count are an average over the run.

Gradients are taken at y, a point between the average x and the fast weights z. Parameters hold y while training;
checkpoints and the model a run leaves hold x. Resume points hold y, z and the average's weights, so that a run goes
on exactly.

The average takes over what a falling learning rate is for. So the rate warms up over ``--warmup_steps`` and then
stays at ``--lr_init``; ``--lr_schedule`` and ``--lr_final`` play no part. Steps of the warm-up count less in the
average, by the square of their rate.

Source: Defazio et al., The Road Less Scheduled (arXiv 2405.15682); package ``schedulefree``.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from rwkvpeft.config.groups import OptimizerConfig
from rwkvpeft.errors import UserError
from rwkvpeft.training.optimizers.contract import Combined, OptimizerKind, needed_package


class ScheduleFree(Combined):
    """The package's optimizer and the switch between its two sets of weights.

    ``running_numbers`` are the numbers of its groups that change from step to step and belong to a resume point.
    """

    running_numbers: ClassVar[tuple[str, ...]] = ("k", "weight_sum", "lr_max")

    def __init__(self, inner: Any) -> None:
        super().__init__([inner])
        self._inner = inner
        # before the first step, and again before a saved state arrives: there is nothing to move yet
        inner.train()

    def take_average(self) -> None:
        """Put the average into the parameters, for good."""
        self._inner.eval()

    @contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """Inside the block the parameters hold the average; afterwards exactly what they held before."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        # going back by the package's own formula would leave rounding errors in the run
        kept = [parameter.detach().cpu().clone() for parameter in parameters]
        self.take_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(parameters, kept, strict=True):
                    parameter.copy_(before)
            for group in self.param_groups:
                group["train_mode"] = True


@contextmanager
def averaged(optimizer: Optimizer) -> Generator[None, None, None]:
    """Inside the block the parameters hold what a checkpoint is to hold; nothing changes for other optimizers."""
    if isinstance(optimizer, ScheduleFree):
        with optimizer.averaged():
            yield
    else:
        yield


def check_schedule_free(device_type: str) -> None:
    """Raises: UserError if the package is missing, on any device."""
    _package()


def _package() -> ModuleType:
    return needed_package("schedulefree", extra="schedulefree")


def build_schedule_free(
    groups: list[dict[str, Any]], config: OptimizerConfig, *, scaled_gradients: bool
) -> Optimizer:
    """AdamW, schedule-free. ``beta1`` says how far y lies from z towards x; it cannot be 0.

    Raises: UserError if ``beta1`` is 0.
    """
    if config.beta1 <= 0:
        raise UserError("--optim schedule_free needs a --beta1 above 0", found=config.beta1, fix="--beta1 0.9")
    return ScheduleFree(
        _package().AdamWScheduleFree(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.adam_eps)
    )


SCHEDULE_FREE = OptimizerKind(build_schedule_free, moment_bytes=8, check=check_schedule_free, keeps_rate=True)
