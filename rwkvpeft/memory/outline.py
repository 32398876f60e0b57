"""The model a run would train, without values: parameters that hold no memory, but have the sizes and dtypes.

It goes through the same steps as a real one (fill, prepare, quantise, attach), so that every method and format is
counted by its own code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.checkpoints.quantised import Quantisation, Quantiser, quantisation_in_run
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.ops.block.contract import BlockOps
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.contract import Backend, Wkv
from rwkvpeft.quantization.format import Format
from rwkvpeft.quantization.linear import QuantizedLinear
from rwkvpeft.registry import BACKENDS, find

DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}

UNPACKED = Quantisation()


# blocks that are looked at to learn what one more of them adds
FEW = 3

class Programs(NamedTuple):
    """What computes the WKV recurrence (None: the program in PyTorch) and the rest of a block."""

    wkv: Wkv | None = None
    block: BlockOps = PLAIN


PLAIN_PROGRAMS = Programs()

MakeAdapter = Callable[[ModelShape], Adapter | None]
"""Makes a new adapter for a model of that shape; None for full training."""


class NoOutline(UserError):
    """The method looks at the values of weights, and an outline has none."""


class Counts(NamedTuple):
    """What rests in memory throughout a run, and how deep its backward pass goes.

    ``frozen_bytes`` of what is frozen; ``trained``, how many (fp32) numbers are trained; ``layers``, how many blocks
    have gradients: all from the first that trains something. ``packed_bytes``: the part of ``frozen_bytes`` that is in
    quantised weights; ``block_bytes``: parameters of the largest block; ``ends_bytes``: those that are in no block;
    ``numbers``: how many there are in all parameters.
    """

    frozen_bytes: int
    trained: int
    layers: int
    packed_bytes: int = 0
    block_bytes: int = 0
    ends_bytes: int = 0
    numbers: int = 0


def count_parameters(shape: ModelShape) -> int:
    """Numbers in a model of that shape."""
    return sum(parameter.numel() for parameter in build_model(shape, _in_pytorch(shape)).parameters())


def _in_pytorch(shape: ModelShape) -> Wkv:
    operator: Backend = find(BACKENDS[operator_of(shape)], "torch", flag="--op")
    return operator.run


def training_outline(
    shape: ModelShape,
    config: TrainConfig,
    adapter: Adapter | None,
    packed: Quantisation = UNPACKED,
    programs: Programs = PLAIN_PROGRAMS,
) -> Rwkv:
    """The model as a training run would have it, on PyTorch's device ``meta``.

    Args:
        adapter: a new one, which belongs to the outline afterwards; None for full training.
        packed: how the base's own file stores its large linears.
        programs: what the run computes with; they must run on tensors without data.
    Raises: UserError if the settings do not suit the sizes; NoOutline.
    """
    dtype = DTYPES[config.runtime.precision or "fp32"]
    wkv = programs.wkv or _in_pytorch(shape)
    divisor = config.model.head_size_divisor
    model = build_model(shape, wkv, head_size_divisor=divisor, block_ops=programs.block)
    weights = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    stored = quantisation_in_run(config.method, packed)
    quantiser = None if adapter is None or stored.quant == "none" else _Outliner(*stored, keep=adapter.trains)
    prepare = adapter.prepare if adapter else None
    fill_model(model, weights, device="meta", dtype=dtype, source="the model", quantiser=quantiser, prepare=prepare)
    if adapter is not None:
        with without_values(config):
            adapter.attach(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    # auto is decided by what the levels need: until then the one that needs least
    model.recompute = LEVELS.get(config.runtime.grad_cp, "block")
    model.regularise(dropout=config.method.dropout, neftune_alpha=config.method.neftune_alpha)
    return model.train()


@contextmanager
def without_values(config: TrainConfig) -> Iterator[None]:
    """Raises: NoOutline if what is done inside asks an outline for a value."""
    try:
        yield
    except RuntimeError as reason:
        # how PyTorch answers then; some tuners of Hugging Face peft choose places by the weights in them
        raise NoOutline(
            "what this run needs cannot be told without running it",
            found=f"--peft {config.method.peft} looks at values: {str(reason).splitlines()[0].split('. ')[0]}",
        ) from reason


def count(model: Rwkv) -> Counts:
    """Count an outline, or a real model that is ready to be trained."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    layers = [int(found[1]) for name in trained if (found := re.match(r"blocks\.(\d+)\.", name))]
    first = 0 if "emb.weight" in trained else min(layers, default=model.shape.n_layer)
    packed = sum(buffer.nbytes for buffer in model.buffers())
    blocks = [sum(map(_bytes, block.parameters())) for block in model.blocks]
    return Counts(
        frozen_bytes=packed + sum(parameter.nbytes for parameter in frozen),
        trained=sum(parameter.numel() for parameter in trained.values()),
        layers=model.shape.n_layer - first,
        packed_bytes=packed,
        block_bytes=max(blocks),
        ends_bytes=sum(map(_bytes, model.parameters())) - sum(blocks),
        numbers=sum(parameter.numel() for parameter in model.parameters()),
    )


def _bytes(parameter: Tensor) -> int:
    return 4 * parameter.numel() if parameter.requires_grad else parameter.nbytes


def counts_of(
    shape: ModelShape, config: TrainConfig, make_adapter: MakeAdapter, packed: Quantisation = UNPACKED
) -> Counts:
    """``count`` for a run's settings. Raises: as ``training_outline``."""

    def counted(layers: int) -> Counts:
        part = replace(shape, n_layer=layers)
        return count(training_outline(part, config, make_adapter(part), packed))

    if not layers_are_alike(config) or shape.n_layer <= FEW + 1:
        return counted(shape.n_layer)
    return Counts(*continued(counted(FEW), counted(FEW + 1), shape.n_layer - FEW))


def layers_are_alike(config: TrainConfig) -> bool:
    """Whether the settings tell no layer from another."""
    words = json.dumps(config.method.peft_config)
    return not config.method.layer_profile and not any(word in words for word in ("blocks", "layers", "pattern"))


def continued(few: Iterable[int], more: Iterable[int], steps: int) -> list[int]:
    """Figures of a model with some blocks and with one more, followed in a straight line for that many blocks."""
    return [a + (b - a) * steps for a, b in zip(few, more, strict=True)]


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
