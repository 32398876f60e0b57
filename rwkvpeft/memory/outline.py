"""The model a run would train, without values: parameters that hold no memory, but have the sizes and dtypes.

It goes through the same steps as a real one (fill, prepare, quantise, attach), so that every method and format is
counted by its own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.checkpoints.quantised import Quantisation, Quantiser
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.ops.contract import Backend
from rwkvpeft.quantization.format import Format
from rwkvpeft.quantization.linear import QuantizedLinear
from rwkvpeft.registry import BACKENDS, find

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

UNPACKED = Quantisation()


class Counts(NamedTuple):
    """What rests in memory throughout a run: bytes of what is frozen, and how many (fp32) numbers are trained."""

    frozen_bytes: int
    trained: int


def count_parameters(shape: ModelShape) -> int:
    """Numbers in a model of that shape."""
    operator: Backend = find(BACKENDS[operator_of(shape)], "torch", flag="--op")
    return sum(parameter.numel() for parameter in build_model(shape, operator.run).parameters())


def training_outline(
    shape: ModelShape, config: TrainConfig, adapter: Adapter | None, packed: Quantisation = UNPACKED
) -> Rwkv:
    """The model as a training run would have it, on PyTorch's device ``meta``.

    Args:
        adapter: a new one, which belongs to the outline afterwards; None for full training.
        packed: how the base's own file stores its large linears.
    Raises: UserError if the settings do not suit the sizes.
    """
    dtype = _DTYPES[config.runtime.precision or "fp32"]
    operator: Backend = find(BACKENDS[operator_of(shape)], "torch", flag="--op")
    model = build_model(shape, operator.run, head_size_divisor=config.model.head_size_divisor)
    weights = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    method = config.method
    chosen = Quantisation(method.quant, method.quant_double, method.quant_head)
    stored = chosen if packed.quant == "none" else packed
    quantiser = None if adapter is None or stored.quant == "none" else _Outliner(*stored, keep=adapter.trains)
    prepare = adapter.prepare if adapter else None
    fill_model(model, weights, device="meta", dtype=dtype, source="the model", quantiser=quantiser, prepare=prepare)
    if adapter is not None:
        adapter.attach(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.checkpointing = bool(config.runtime.grad_cp)
    for block in model.blocks:
        block.dropout = config.method.dropout  # type: ignore[assignment]
    return model.train()


def count(model: Rwkv) -> Counts:
    """Count an outline, or a real model that is ready to be trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return Counts(sum(tensor.nbytes for tensor in [*frozen, *model.buffers()]), trained)


class _Outliner(Quantiser):
    """Puts linears of the right size, without values, where a run has quantised ones."""

    def module(self, name: str, weight: Tensor) -> QuantizedLinear:
        format = _WithoutValues(self.format)
        out_features, in_features = weight.shape
        layout = format.layout((out_features, in_features))
        tensors = {part: torch.empty(size, dtype=dtype, device="meta") for part, (size, dtype) in layout.items()}
        return QuantizedLinear(in_features, out_features, format, tensors)


class _WithoutValues(Format):
    """A format's sizes; no package is needed, and a product makes the dequantised weight, as on every device."""

    def __init__(self, format: Format) -> None:
        self._format = format

    @property
    def bits(self) -> float:
        return self._format.bits

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self._format.layout(shape)

    def quantize(self, weight: Tensor, *, name: str = "a weight") -> dict[str, Tensor]:
        layout = self.layout((weight.shape[0], weight.shape[1]))
        return {part: weight.new_empty(size, dtype=dtype) for part, (size, dtype) in layout.items()}

    def dequantize(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=packed["codes"].device)
