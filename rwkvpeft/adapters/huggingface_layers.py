"""Tuners of Hugging Face peft on a model's linears: putting them there, and reaching their tensors by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkvpeft.adapters.huggingface_settings import TunerSettings, library
from rwkvpeft.adapters.targets import replace_module
from rwkvpeft.errors import UserError
from rwkvpeft.models.layers import Linear

# each of these came out of one tuner or another, given a size or a model it was not written for
FAILURES = (
    ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, AssertionError, AttributeError, KeyError,
    IndexError, ArithmeticError,
)
"""What the package raises where a method cannot be used."""

IN_MODEL = "base_model.model."
ON_TUNER = "base_model."
OF_A_LINEAR = re.compile(r"^(blocks\.\d+\.(?:att|ffn|ffnPre)\.\w+|head)\.(.+)$")


class Traits(NamedTuple):
    """What is particular to a tuner; the sets hold first parts of tensor names (lora_A, vera_B).

    ``constant``: not trained. ``repeated``: shared by all linears, and yet repeated at each in the package's files.
    ``derived``: computed from the base and not in the package's files. The package does so anew when it reads a file;
    a singular vector may then point the other way on another device, where what was trained would no longer fit.
    ``needs_wide_input``: its layers cannot compute in fewer bits than the weight has, as beside a quantised one.
    """

    constant: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()
    derived: frozenset[str] = frozenset()
    needs_wide_input: bool = False


class State(NamedTuple):
    """A tuner's tensors by the package's names, aliases included."""

    tensors: dict[str, Tensor]

    def canonical(self) -> dict[str, Tensor]:
        """Every tensor once, by our name; what is shared by its name on the tuner."""
        seen: set[int] = set()
        found: dict[str, Tensor] = {}
        for name in sorted(self.tensors, key=lambda name: name.startswith(IN_MODEL)):
            if id(self.tensors[name]) not in seen:
                seen.add(id(self.tensors[name]))
                found[short_name(name)] = self.tensors[name]
        return found

    def repeated(self) -> list[str]:
        """Our names of what is repeated at each linear."""
        names = {id(tensor) for name, tensor in self.tensors.items() if not name.startswith(IN_MODEL)}
        return [short_name(name) for name, tensor in self.tensors.items()
                if name.startswith(IN_MODEL) and id(tensor) in names]


def state_of(peft: Any) -> State:
    """What the package would write into a file, as the tensors themselves."""
    names = import_module("peft").get_peft_model_state_dict(
        peft, state_dict=peft.state_dict(keep_vars=True), save_embedding_layers=False
    )
    return State(dict(names))


def full_state(peft: Any, paths: Iterable[str], traits: Traits) -> dict[str, Tensor]:
    """What our files hold of the tuner on the linears at ``paths``, by our names."""
    derived = {name: buffer for name, buffer in hidden_buffers(peft, paths).items()
               if first_part(name) in traits.derived}
    return {**state_of(peft).canonical(), **derived}


def hidden_buffers(peft: Any, paths: Iterable[str]) -> dict[str, Tensor]:
    """Floating-point buffers outside the package's files, where those of a linear are smaller than half its weight."""
    root = peft.base_model.model
    found: dict[str, Tensor] = {}
    for path in paths:
        layer = root.get_submodule(path)
        in_file = set(layer.state_dict())
        hidden = {
            name: buffer for name, buffer in layer.named_buffers()
            if name not in in_file and not name.startswith("base_layer.") and buffer.is_floating_point()
        }
        base = layer.get_base_layer()
        if sum(buffer.numel() for buffer in hidden.values()) * 2 < base.in_features * base.out_features:
            found |= {f"{path}.{name.replace('.default', '')}": buffer for name, buffer in hidden.items()}
    return found


def put_values(peft: Any, given: Mapping[str, Tensor], *, resize: bool) -> None:
    """Copy values into a tuner; ``resize`` lets a tensor become another size."""
    state = state_of(peft)
    held = {id(tensor) for tensor in (*peft.parameters(), *peft.buffers())}
    own = {short_name(name): (name, tensor) for name, tensor in state.tensors.items()}
    own |= {name: (name, tensor) for name, tensor in hidden_buffers(peft, _adapted(peft)).items()}
    through_the_package = {}
    for name, value in given.items():
        full, tensor = own[name]
        if id(tensor) not in held:
            # made for the file, as SHiRA's places: only the package knows where it goes
            through_the_package[full] = value
        elif resize:
            tensor.data = value
        else:
            tensor.data.copy_(value)
    if through_the_package:
        import_module("peft").set_peft_model_state_dict(peft, through_the_package)


def _adapted(peft: Any) -> list[str]:
    return [path for path, module in peft.base_model.model.named_modules() if hasattr(module, "base_layer")]


def inject(config: TunerSettings, model: nn.Module, paths: list[str]) -> Any:
    """Put a tuner's layers around the linears at ``paths``; returns the package's model around ours.

    Raises: UserError with the package's own words if it cannot.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return _peft_model(config, model, paths)
    originals = {path: model.get_submodule(path) for path in paths}
    try:
        return _peft_model(config, model, paths)
    except UserError:
        return _outline(config, model, originals)


def _peft_model(config: TunerSettings, model: nn.Module, paths: list[str]) -> Any:
    try:
        return library().PeftModel(model, config.config(paths))
    except FAILURES as reason:
        words = str(reason).strip().splitlines()
        raise UserError(f"{config.tuner.name} cannot be used with these settings on this model",
                        found=words[0] if words else repr(reason)) from reason


def _outline(config: TunerSettings, model: nn.Module, originals: Mapping[str, Any]) -> Any:
    """On a model without data, for tuners that look at the weights: they see weights that are all one zero."""
    for path, linear in originals.items():
        replace_module(model, path, _linear(torch.zeros(1).expand(linear.out_features, linear.in_features)))
    peft = _peft_model(config, model, list(originals))
    for path, linear in originals.items():
        layer: Any = model.get_submodule(path)
        layer.to("meta")
        layer.base_layer = linear
    return peft


def widen(layer: nn.Module) -> None:
    """Let a layer compute in fp32, as the weight of a quantised linear is, and answer in the dtype of its input."""
    dtype = torch.float32

    def to_fp32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal dtype
        dtype = inputs[0].dtype
        return (inputs[0].float(), *inputs[1:])

    def narrow(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y.to(dtype)

    layer.register_forward_pre_hook(to_fp32)
    layer.register_forward_hook(narrow)


def linears_by_path(weights: Mapping[str, Tensor]) -> nn.Module:
    """A module that has nothing but these linears, frozen, at these dotted paths."""
    root = nn.Module()
    for path, weight in weights.items():
        *parents, last = path.split(".")
        place = root
        for part in parents:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, _linear(weight))
    return root


def _linear(weight: Tensor) -> Linear:
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def short_name(name: str) -> str:
    """The package's name without what it puts in front."""
    return name.removeprefix(ON_TUNER).removeprefix("model.")


def first_part(name: str) -> str:
    """``vera_lambda_b`` of ``blocks.0.att.key.vera_lambda_b``; the first part of a shared tensor's name."""
    matched = OF_A_LINEAR.match(name)
    return (matched.group(2) if matched else name).partition(".")[0]


def linear_of(name: str) -> str | None:
    """The path of the linear an adapter's tensor belongs to; None if it belongs to all or to none."""
    matched = OF_A_LINEAR.match(name)
    return matched.group(1) if matched else None

