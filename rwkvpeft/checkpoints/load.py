"""From a checkpoint file to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvpeft.checkpoints.files import MappedTensors
from rwkvpeft.checkpoints.quantised import HEAD, PackedWeight, Quantiser, find_packed, model_outline
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv, Wkv
from rwkvpeft.models.names import COPY_MASK, is_large_linear, is_state
from rwkvpeft.models.shape import ModelShape, read_shape
from rwkvpeft.ops.bench import Bench
from rwkvpeft.ops.block.contract import BlockOps
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.choose import choose_backend
from rwkvpeft.ops.contract import Needs
from rwkvpeft.quantization.linear import QuantizedLinear
from rwkvpeft.registry import MODELS, find

Prepare = Callable[[str, Tensor], Tensor]
"""Takes the module path of a large linear or the head and its weight (out, in), gives the weight to be loaded, of any
float dtype."""

_OPERATORS = {"x052": "wkv5", "x060": "wkv6", "x070": "wkv7"}


def load_model(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    op: str = "auto",
    head_size_divisor: float = 8,
    block_ops: BlockOps = PLAIN,
    quantiser: Quantiser | None = None,
    prepare: Prepare | None = None,
) -> Rwkv:
    """Load an official RWKV v5.2, v6 or v7 checkpoint; version and every size are read from the file.

    Args:
        path: a ``.pth`` of fp32, fp16 or bf16 tensors, or one that ``rwkvpeft.quantize`` wrote. Prefixes of trainers
            (``_forward_module.`` and the like) are stripped, and a v7 file may lack block 0's unused v0, v1, v2.
        device: where the weights go.
        dtype: dtype of weights and activations; None keeps the file's.
        op: backend of the WKV operator, see ``rwkvpeft.ops``.
        head_size_divisor: group-norm eps after the time mixing is 1e-5 times its square; files do not tell it.
        block_ops: what computes the rest of a block.
        quantiser: stores the large linears in fewer bits, each as it is read; None leaves them as the file has them.
        prepare: changes the large linears and the head before that.
    Returns: the model in evaluation mode, a merged ``time_state`` in place.
    Raises: UserError if the file is missing, broken, of another architecture, or if tensors are missing, left over
        or misshapen.
    """
    tensors = MappedTensors(path)
    shape = read_shape(model_outline(tensors, find_packed(tensors, str(path))), str(path))
    if dtype is None:
        dtype = tensors.outline["emb.weight"].dtype
    place = torch.device(device)
    needs = Needs(device_type=place.type, dtype=dtype, head_size=shape.head_size, training=False)
    bench = Bench.of(place) if place.type == "cuda" else None
    wkv = choose_backend(_OPERATORS[shape.version], op, needs, bench).run
    model = build_model(shape, wkv, head_size_divisor=head_size_divisor, block_ops=block_ops)
    fill_model(model, tensors, device=device, dtype=dtype, source=str(path), quantiser=quantiser, prepare=prepare)
    return model.eval()


def build_model(shape: ModelShape, wkv: Wkv, *, head_size_divisor: float = 8, block_ops: BlockOps = PLAIN) -> Rwkv:
    """A model of that shape without values: its parameters hold no memory until ``fill_model`` puts tensors there."""
    with torch.device("meta"):
        version: type[Rwkv] = find(MODELS, shape.version, flag="--my_testing")
        return version(shape, wkv, head_size_divisor=head_size_divisor, block_ops=block_ops)


def operator_of(shape: ModelShape) -> str:
    """The name of the WKV operator a version runs on."""
    return _OPERATORS[shape.version]


def fill_model(
    model: Rwkv,
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    source: str,
    quantiser: Quantiser | None = None,
    prepare: Prepare | None = None,
) -> None:
    """Put tensors with official names into ``model``, one after another, so that no second copy exists.

    Args:
        tensors: of an official checkpoint or a quantised one.
        device, dtype: where the weights go and what they become; a quantised one keeps its format.
        source: how messages name the file.
        quantiser: replaces the linears it takes by quantised ones.
        prepare: changes the large linears and the head before that.
    Raises: UserError naming what is missing, left over or misshapen; a quantised file and another ``quantiser``.
    """
    packed = find_packed(tensors, source)
    _check_quantiser(packed, quantiser, source)
    outline = model_outline(tensors, packed)
    _add_optional(model, outline)
    _check_fit(model, outline, source)
    for name, parameter in list(model.named_parameters()):
        kept = _memory_dtype(dtype) if is_state(name) else dtype
        if name not in outline:
            value: Tensor | QuantizedLinear = torch.zeros(parameter.shape, dtype=kept)
        else:
            value = _weight(name, tensors, packed.get(name), quantiser, prepare)
        if isinstance(value, QuantizedLinear):
            _put(model, name.removesuffix(".weight"), value.to(device))
            continue
        # copied: a parameter must not share memory with the mapped file
        value = value.to(device=device, dtype=kept, copy=True).view(parameter.shape)
        _put(model, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    if isinstance(tensors, MappedTensors):
        tensors.release()
    model.compute_dtype = dtype


def _weight(
    name: str,
    tensors: Mapping[str, Tensor],
    packed: PackedWeight | None,
    quantiser: Quantiser | None,
    prepare: Prepare | None,
) -> Tensor | QuantizedLinear:
    """The checkpoint's tensor ``name`` as the model takes it, packed or plain."""
    if packed is None:
        weight = _prepared(name, tensors[name], prepare)
        return quantiser.module(name, weight) if quantiser is not None and quantiser.takes(name) else weight
    linear = packed.read(tensors)
    keep = quantiser is not None and quantiser.keep(name)
    if prepare is None and not keep:
        return linear
    weight = linear.dequantized()
    if _prepared(name, weight, prepare) is not weight:
        raise UserError(
            f"{name} is quantised already, and the adapter changes it before that",
            fix="give the full-precision checkpoint and --quant, which quantises what the adapter leaves",
        )
    return weight if keep else linear


def _prepared(name: str, weight: Tensor, prepare: Prepare | None) -> Tensor:
    is_linear = is_large_linear(name) or name == HEAD
    return prepare(name.removesuffix(".weight"), weight) if prepare is not None and is_linear else weight


def _check_quantiser(packed: Mapping[str, PackedWeight], quantiser: Quantiser | None, source: str) -> None:
    formats = {weight.format for weight in packed.values()}
    if quantiser is not None and formats - {quantiser.format}:
        raise UserError(
            f"{source} is quantised already and cannot be quantised in another way",
            found=sorted(format.label for format in formats),
            expected=quantiser.format.label,
            fix="leave --quant out, or give the full-precision checkpoint",
        )


def _check_fit(model: Rwkv, outline: Mapping[str, Tensor], source: str) -> None:
    parameters = dict(model.named_parameters())
    problems = []
    for name, parameter in parameters.items():
        if name not in outline:
            if not _is_unused(name, model.shape):
                problems.append(f"{name} is missing")
        elif outline[name].numel() != parameter.numel():
            problems.append(f"{name} is {tuple(outline[name].shape)}, not {tuple(parameter.shape)}")
    problems += [f"{name} is not a tensor of {model.shape.version}" for name in outline
                 if name not in parameters and not (name == COPY_MASK and model.shape.head_qk)]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{source} does not fit RWKV {model.shape.version} with {model.shape.n_layer} layers",
            found=", ".join(problems[:4]) + more,
            expected="the tensors of an official checkpoint",
            fix="is the file complete, and is it a plain v5.2, v6 or v7 model?",
        )


def _is_unused(name: str, shape: ModelShape) -> bool:
    """Whether nothing reads that tensor: block 0 of v7 has no earlier value, and old files lack its v0, v1, v2."""
    return shape.version == "x070" and name in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


def _add_optional(model: Rwkv, outline: Mapping[str, Tensor]) -> None:
    """Make room for merged initial states."""
    shape = model.shape
    memory = (shape.n_head, shape.head_size, shape.head_size)
    shift = (shape.n_embd,)
    for layer in range(shape.n_layer):
        states = {"att.time_state": memory, "att.shift_state": shift, "ffn.shift_state": shift}
        if layer not in shape.time_mixing_layers:
            states = {"ffnPre.shift_state": shift, "ffn.shift_state": shift}
        for state, sizes in states.items():
            if (name := f"blocks.{layer}.{state}") in outline:
                _put(model, name, nn.Parameter(torch.empty(sizes, device="meta")))


def _memory_dtype(dtype: torch.dtype) -> torch.dtype:
    # the recurrence starts from it and runs in fp32 whatever the weights are
    return torch.float64 if dtype == torch.float64 else torch.float32


def _put(model: nn.Module, name: str, part: nn.Parameter | nn.Module) -> None:
    """Set the parameter or submodule at the dotted ``name``."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, part)
