"""From a checkpoint file to a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv, Wkv
from rwkvpeft.models.shape import ModelShape, normalise_names, read_shape
from rwkvpeft.ops.choose import choose_backend
from rwkvpeft.ops.contract import Needs
from rwkvpeft.registry import MODELS, find

_OPERATORS = {"x052": "wkv5", "x060": "wkv6", "x070": "wkv7"}


def load_model(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    op: str = "auto",
    head_size_divisor: float = 8,
) -> Rwkv:
    """Load an official RWKV v5.2, v6 or v7 checkpoint; version and every size are read from the file.

    Args:
        path: a ``.pth`` of fp32, fp16 or bf16 tensors. Prefixes of trainers (``_forward_module.`` and the like) are
            stripped, and a v7 file may lack block 0's unused v0, v1, v2.
        device: where the weights go.
        dtype: dtype of weights and activations; None keeps the file's.
        op: backend of the WKV operator, see ``rwkvpeft.ops``.
        head_size_divisor: group-norm eps after the time mixing is 1e-5 times its square; files do not tell it.
    Returns: the model in evaluation mode, a merged ``time_state`` in place.
    Raises: UserError if the file is missing, broken, of another architecture, or if tensors are missing, left over
        or misshapen.
    """
    tensors = normalise_names(load_tensors(path))
    shape = read_shape(tensors, str(path))
    if dtype is None:
        dtype = tensors["emb.weight"].dtype
    needs = Needs(device_type=torch.device(device).type, dtype=dtype, head_size=shape.head_size, training=False)
    wkv = choose_backend(_OPERATORS[shape.version], op, needs).run
    model = build_model(shape, wkv, head_size_divisor=head_size_divisor)
    fill_model(model, tensors, device=device, dtype=dtype, source=str(path))
    return model.eval()


def build_model(shape: ModelShape, wkv: Wkv, *, head_size_divisor: float = 8) -> Rwkv:
    """A model of that shape without values: its parameters hold no memory until ``fill_model`` puts tensors there."""
    with torch.device("meta"):
        model: Rwkv = find(MODELS, shape.version, flag="--my_testing")(shape, wkv, head_size_divisor=head_size_divisor)
    return model


def operator_of(shape: ModelShape) -> str:
    """The name of the WKV operator a version runs on."""
    return _OPERATORS[shape.version]


def fill_model(
    model: Rwkv, tensors: dict[str, Tensor], *, device: torch.device | str, dtype: torch.dtype, source: str
) -> None:
    """Put tensors with official names into ``model``, one after another, so that no second copy exists.

    Raises: UserError naming what is missing, left over or misshapen.
    """
    left = dict(tensors)
    _add_optional(model, left, dtype)
    problems = []
    for name, parameter in list(model.named_parameters()):
        tensor = left.pop(name, None)
        if tensor is None:
            problems.append(f"{name} is missing")
        elif tensor.numel() != parameter.numel():
            problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        else:
            # copied: a parameter must not share memory with the mapped file
            kept = _memory_dtype(dtype) if name.endswith(".time_state") else dtype
            value = tensor.to(device=device, dtype=kept, copy=True).view(parameter.shape)
            _set_parameter(model, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    problems += [f"{name} is not a tensor of {model.shape.version}" for name in left]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{source} does not fit RWKV {model.shape.version} with {model.shape.n_layer} layers",
            found=", ".join(problems[:4]) + more,
            expected="the tensors of an official checkpoint",
            fix="is the file complete, and is it a plain v5.2, v6 or v7 model?",
        )
    model.compute_dtype = dtype


def _add_optional(model: Rwkv, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Make room for a merged ``time_state``, and give block 0 of v7 the values that nothing reads."""
    shape = model.shape
    for layer in range(shape.n_layer):
        if f"blocks.{layer}.att.time_state" in tensors:
            empty = torch.empty(shape.n_head, shape.head_size, shape.head_size, device="meta")
            _set_parameter(model, f"blocks.{layer}.att.time_state", nn.Parameter(empty))
    if shape.version == "x070":
        for name in ("v0", "v1", "v2"):
            unused = model.get_parameter(f"blocks.0.att.{name}")
            tensors.setdefault(f"blocks.0.att.{name}", torch.zeros(unused.shape, dtype=dtype))


def _memory_dtype(dtype: torch.dtype) -> torch.dtype:
    # the recurrence starts from it and runs in fp32 whatever the weights are
    return torch.float64 if dtype == torch.float64 else torch.float32


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)
