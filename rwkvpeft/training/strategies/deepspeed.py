"""DeepSpeed's ZeRO through Lightning, on GPUs and, so that all of it can be tried anywhere, on CPUs.

ZeRO splits what N processes would each hold whole: stage 1 the optimizer's moments and the fp32 copy it steps on,
stage 2 the gradients too, stage 3 the weights too, frozen ones included; quantised weights are buffers, which stay
whole. Source: Rajbhandari et al., ZeRO (arXiv 1910.02054). Trained weights are fp32 here, so that every stage computes
what one process computes. Parts are put together under the names that every other strategy saves (``Sharing``).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Block
from rwkvpeft.training.optimizers.moments import saved_state
from rwkvpeft.training.strategies.contract import Sharing, swapped, trained_parameters
from rwkvpeft.training.strategies.deepspeed_settings import deepspeed_settings, fit_buckets, read_stage


class DeepSpeed(Sharing):
    """``--strategy deepspeed_stage_N`` and ``_offload``."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.stage = read_stage(config.runtime.strategy)
        self.splits_weights = self.stage == 3
        if find_spec("deepspeed") is None:
            raise UserError(
                f"--strategy {config.runtime.strategy} needs the package deepspeed",
                fix="pip install 'rwkvpeft[deepspeed]', or --strategy ddp",
            )
        if self.device_type not in ("cpu", "cuda"):
            raise UserError(f"DeepSpeed does not run on {self.device_type}", fix="--strategy auto")

    def strategy(self) -> Any:
        """Lightning's own, which asks for a GPU, taught to use CPUs too."""
        settings = deepspeed_settings(self.config, self.device_type)
        quiet_import(self.device_type)
        _check_section(self.config.runtime.ds_config, settings["zero_optimization"])
        return ZeroStrategy(config=settings, exclude_frozen_parameters=True)

    def precision(self) -> Any:
        """Arithmetic stays the model's own."""
        return _Unchanged("32-true")

    def step_ends(self, trainer: pl.Trainer, ends: bool) -> None:
        """Mini-epochs may end with a smaller step, which DeepSpeed's own counting would not notice."""
        _engine(trainer).set_gradient_accumulation_boundary(ends)

    def gradient_norm(self, trained: list[nn.Parameter], largest: float) -> Tensor | None:
        """DeepSpeed measures and clips within the step, which it leaves out if the norm is not finite."""
        return None

    def norm_of_step(self, trainer: pl.Trainer) -> float:
        """As DeepSpeed measured it."""
        engine = _engine(trainer)
        norm = engine.get_global_grad_norm()
        return float(norm) if engine.was_step_applied() and norm is not None else math.inf

    def part(self, tensor: Tensor) -> Tensor:
        """Stage 3 leaves an empty weight in the place of its part."""
        part: Tensor = getattr(tensor, "ds_tensor", tensor)
        return part

    def run(self, trainer: pl.Trainer, work: Callable[[], Any]) -> Any:
        """Stage 3 gathers weights in forward passes of its own wrapper."""
        return trainer.strategy.validation_step(work) if self.splits_weights else work()

    @contextmanager
    def whole(self, model: nn.Module, *, here: bool, frozen_too: bool = False) -> Generator[None, None, None]:
        """One weight at a time is gathered, and kept in main memory where it is wanted."""
        if not self.splits_weights:
            yield
            return
        with swapped(model, dict(_gathered(model, here=here, frozen_too=frozen_too))):
            yield

    def moments(self, model: nn.Module, optimizer: Optimizer, *, here: bool) -> dict[str, Tensor]:
        """Gathered parameter by parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = _zero(optimizer)
        if self.stage < 3:
            _link_states(zero)
        state: dict[str, Any] = next(iter(zero.optimizer.state.values()), {})
        tensors: dict[str, Tensor] = {}
        for name, parameter in trained_parameters(model):
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.numel() == 1:
                    # the step's number, the same for all
                    found = torch.as_tensor(value).detach().cpu()
                else:
                    found = safe_get_full_optimizer_state(parameter, key)
                if here:
                    tensors[f"optim.{name}.{key}"] = found.cpu()
        return tensors

    def load_moments(self, model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Every process takes its part of each."""
        saved = saved_state(tensors)
        if not saved:
            return
        zero = _zero(optimizer)
        numbers = {key: value for key, value in next(iter(saved.values())).items() if value.numel() == 1}
        shapes = [key for key in next(iter(saved.values())) if key not in numbers]
        for flat in _flat_parts(zero, self.stage):
            zeros = {key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in shapes}
            zero.optimizer.state[flat] = {**{key: value.clone() for key, value in numbers.items()}, **zeros}
        if self.stage < 3:
            _link_states(zero)
        for name, parameter in trained_parameters(model):
            for key in shapes:
                _set_state(parameter, key, saved[name][key], self.stage)


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy without its refusal of CPUs, and with accumulation left to Lightning."""

    def setup_environment(self) -> None:
        """As Lightning's, but for the check of the accelerator; processes of a CPU are numbered like GPUs."""
        assert self.accelerator is not None
        assert self.parallel_devices is not None
        if self.parallel_devices[0].type == "cpu":
            self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning takes a step when all its micro-batches are there, as with every other strategy."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """DeepSpeed itself knows when to put gradients together."""
        yield

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        assert self.config is not None
        self.config = fit_buckets(
            self.config,
            trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            weights=sum(parameter.numel() for parameter in model.parameters()),
        )
        if self.zero_stage_3:
            _split_weights(model, self.config)
            # buffers, which DeepSpeed takes to be there; and the module learns its device
            model.to(self.root_device)
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)


class _Unchanged(DeepSpeedPrecision):
    """Neither weights nor batches are cast, and losses are those of the whole step already."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Leave the dtypes alone."""
        return module

    def convert_input(self, data: Any) -> Any:
        """Leave the dtypes alone."""
        return data

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning has divided by the number of micro-batches."""
        _engine(model.trainer).backward(tensor, scale_wrt_gas=False)


def quiet_import(device_type: str) -> ModuleType:
    """DeepSpeed, which picks its device while it is imported and otherwise says so at length."""
    # it reads nothing else
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # an operator for inference that processes of a CPU would compile at the start, behind a lock that a kill leaves
    # locked for ever
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _check_section(path: str, zero: Mapping[str, Any]) -> None:
    """Raises: UserError if DeepSpeed does not take what ``--ds_config`` makes of its largest section."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as reason:
        # pydantic's: a first line that counts, then a name, and what is wrong with it
        found = " ".join(line.strip() for line in str(reason).splitlines()[1:3])
        raise UserError(f"--ds_config {path}: DeepSpeed does not take its zero_optimization", found=found) from reason


def _split_weights(model: nn.Module, settings: dict[str, Any]) -> None:
    """Give each process its part before anything reaches a GPU, and gather blocks as wholes: their operators read the
    weights of modules that are not called themselves."""
    import deepspeed

    for block in deepspeed.utils.set_z3_leaf_modules(model, [Block]):
        block.register_forward_pre_hook(_with_gradient)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)


def _with_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """DeepSpeed takes a block's gradients when that of its input is there: the first trained block has one, too."""
    x, *rest = inputs
    if torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    return (x, *rest)


def _engine(trainer: pl.Trainer) -> Any:
    return trainer.strategy.model


def _zero(optimizer: Any) -> Any:
    """DeepSpeed's optimizer under Lightning's wrapper."""
    return getattr(optimizer, "_optimizer", optimizer)


def _flat_parts(zero: Any, stage: int) -> list[Tensor]:
    parts: list[Tensor] = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    return parts


def _link_states(zero: Any) -> None:
    """Let parameters find their states. DeepSpeed does so once, when only the first group has had a step."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def _gathered(model: nn.Module, *, here: bool, frozen_too: bool) -> Iterator[tuple[str, Tensor]]:
    import deepspeed

    for name, parameter in trained_parameters(model, frozen_too=frozen_too):
        with deepspeed.zero.GatheredParameters([parameter]):
            if here:
                yield name, parameter.detach().cpu().clone()


def _set_state(parameter: Any, key: str, value: Tensor, stage: int) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if stage < 3:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        return
    # DeepSpeed's own way to set a whole state takes sizes only that divide by the number of processes
    size = parameter.partition_numel()
    rank = torch.distributed.get_rank()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
    safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], key)
