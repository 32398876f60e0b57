"""PyTorch's fully sharded data parallel: each process holds an even part of every weight, gradient and moment.

A block's weights are put together while the block runs, forward and backward; embedding, final norm and head stay
together from the forward pass to the backward pass. Quantised weights are buffers, which stay whole on each process.
Source: Zhao et al., PyTorch FSDP (arXiv 2304.11277), in its form of parameters split one by one (``fully_shard``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed.fsdp
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.training.optimizers.moments import load_moments
from rwkvpeft.training.strategies.contract import Sharing, swapped, trained_parameters


class Fsdp(Sharing):
    """``--strategy fsdp``."""

    splits_weights = True

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if not hasattr(torch.distributed.fsdp, "fully_shard"):
            raise UserError(
                "--strategy fsdp needs PyTorch 2.6 or newer",
                found=torch.__version__,
                fix="--strategy deepspeed_stage_3",
            )

    def strategy(self) -> Any:
        """DDP's processes, with the model split instead of wrapped."""
        return ShardingStrategy()

    def gradient_norm(self, trained: list[nn.Parameter], largest: float) -> Tensor | None:
        """Of the parts on all processes."""
        return _full(super().gradient_norm(trained, largest))

    def part(self, tensor: Tensor) -> Tensor:
        """An even part of each."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def run(self, trainer: pl.Trainer, work: Callable[[], Any]) -> Any:
        """Without a backward pass embedding and head would stay together, as parameters the optimizer does not know."""
        try:
            return work()
        finally:
            assert trainer.lightning_module is not None
            for module in trainer.lightning_module.modules():
                if isinstance(module, torch.distributed.fsdp.FSDPModule):
                    module.reshard()

    @contextmanager
    def whole(self, model: nn.Module, *, here: bool, frozen_too: bool = False) -> Generator[None, None, None]:
        """One weight at a time is gathered, and kept in main memory where it is wanted."""
        with swapped(model, dict(_gathered(model, here=here, frozen_too=frozen_too))):
            yield

    def moments(self, model: nn.Module, optimizer: Optimizer, *, here: bool) -> dict[str, Tensor]:
        """Gathered tensor by tensor."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in trained_parameters(model):
            for key, value in optimizer.state.get(parameter, {}).items():
                full = _full(value) if isinstance(value, Tensor) else torch.as_tensor(value)
                if here:
                    tensors[f"optim.{name}.{key}"] = full.cpu()
        return tensors

    def load_moments(self, model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Every process takes its part of each."""
        parameters = dict(model.named_parameters())

        def part(name: str, tensor: Tensor) -> Tensor:
            like = parameters.get(name.partition(".")[2].rpartition(".")[0])
            if not isinstance(like, DTensor) or tensor.shape != like.shape:
                return tensor
            return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

        load_moments(model, optimizer, {name: part(name, tensor) for name, tensor in tensors.items()})


class ShardingStrategy(DDPStrategy):
    """Lightning's processes and communication, with ``fully_shard`` in the place of DDP's wrapper."""

    def model_to_device(self) -> None:
        """Parts go to the device, block by block, when the model is split: it need not fit there whole."""

    def configure_ddp(self) -> None:
        """Split the model inside the Lightning module."""
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        assert self.lightning_module is not None
        model = self.lightning_module.model
        assert isinstance(model, Rwkv)
        mesh = torch.distributed.init_device_mesh(self.root_device.type, (self.world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # what objectives and evaluations call
        register_fsdp_forward_method(model, "hidden")
        # buffers; and the module learns its device
        self.lightning_module.to(self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Gradients of every micro-batch are split at once, which is what saves their memory."""
        yield


def _full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _gathered(model: nn.Module, *, here: bool, frozen_too: bool) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in trained_parameters(model, frozen_too=frozen_too):
        full = _full(parameter.detach())
        if here:
            yield name, full.cpu()
