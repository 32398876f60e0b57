"""Any tuner of Hugging Face peft that works on linears, as one of our adapters.

Tensors in files have the package's own names without the parts it puts in front: ``blocks.0.att.key.vera_lambda_b``,
and ``vera_A`` for what all linears share. Trained tensors are fp32. What is not trained but was drawn at random or
computed from the base (VeRA's matrices, SHiRA's places, PSOFT's directions) is a constant of the file, once even where
the package would repeat it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter, check_tensors
from rwkvpeft.adapters.huggingface_settings import TunerSettings, library
from rwkvpeft.adapters.rank_allocation import RankAllocation, is_allocation_state
from rwkvpeft.adapters.targets import replace_module, target_paths
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.models.layers import Linear

FAILURES = (
    ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, AssertionError, AttributeError, KeyError,
    IndexError, ArithmeticError,
)
"""What the package raises where a method cannot be used."""

IN_MODEL = "base_model.model."
ON_TUNER = "base_model."
_OF_A_LINEAR = re.compile(r"^(blocks\.\d+\.(?:att|ffn)\.\w+|head)\.(.+)$")
_OF_THE_MODEL = ("blocks.", "head.", "emb.", "ln_out.")


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


class PeftAdapter(Adapter):
    """A tuner of the package on the linears of a model.

    Args:
        config: the tuner and its settings.
        traits: found out by trying the tuner.
        train_parts: base parameters trained beside it.
    """

    Config = TunerSettings
    config: TunerSettings
    name: ClassVar[str]

    def __init__(
        self, config: TunerSettings, traits: Traits = Traits(), train_parts: Iterable[str] = ()  # noqa: B008
    ) -> None:
        super().__init__(config, train_parts)
        self.name = config.tuner.name  # type: ignore[misc]
        self.traits = traits
        self._given: dict[str, Tensor] = {}
        self._of_linear: dict[str, list[str]] = {}
        self._shared: list[str] = []
        self._paths: list[str] = []
        self._peft: Any = None
        self._trained: list[str] = []
        self._allocation: RankAllocation | None = None

    def settings(self) -> dict[str, Any]:
        """All settings, as ``--peft_config`` takes them."""
        return dict(self.config.values)

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names of the package's own files become ours."""
        return {short_name(name): tensor for name, tensor in tensors.items()}

    def take_constants(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the constants; what belongs to which linear is remembered for merging."""
        rest = {}
        for name, tensor in tensors.items():
            matched = _OF_A_LINEAR.match(name)
            first = (matched.group(2) if matched else name).partition(".")[0]
            if matched:
                self._of_linear.setdefault(matched.group(1), []).append(name)
            elif self.is_shared(name):
                self._shared.append(name)
            if (matched or self.is_shared(name)) and (first in self.traits.constant or is_allocation_state(name)):
                self._given[name] = tensor
            else:
                rest[name] = tensor
        return rest

    # on the model

    def insert(self, model: nn.Module) -> None:
        """Put the tuner's layers around the targets.

        Raises: UserError with the package's own words if its settings do not suit the sizes of this model.
        """
        self._paths = self.target_paths(model)
        training = {path: model.get_submodule(path).training for path in self._paths}
        self._peft = _inject(self.config, model, self._paths)
        for path in self._paths:
            layer: Any = model.get_submodule(path)
            if not hasattr(layer, "base_layer"):
                raise UserError(f"{self.name} left {path} as it is", fix="another target_modules")
            # the package makes layers that train
            layer.train(training[path])
            if self.traits.needs_wide_input and not isinstance(layer.get_base_layer(), Linear):
                _widen(layer)
        self._freeze_bookkeeping(model)
        self._trained = [name for name, tensor in self._own_state().items() if tensor.requires_grad]
        tuner = self._peft.base_model
        if hasattr(tuner, "rankallocator"):
            state = {name: tensor for name, tensor in self._given.items() if is_allocation_state(name)}
            self._allocation = RankAllocation(tuner, model, state)
        self._put_constants({name: tensor for name, tensor in self._given.items() if not is_allocation_state(name)})
        self._given = {}

    def _freeze_bookkeeping(self, model: nn.Module) -> None:
        """Single numbers outside the file, as AdaLoRA's first rank, which on a bf16 base the package lets train.

        Raises: UserError if more than that would be trained and not saved.
        """
        held = {id(tensor) for tensor in self._own_state().values()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in held:
                if parameter.numel() > 1:
                    raise UserError(f"{self.name} trains more than its file holds", found=name)
                parameter.requires_grad_(False)

    def target_paths(self, model: nn.Module) -> list[str]:
        """The linears the settings name.

        Raises: UserError if a name fits none, or none is left.
        """
        values = self.config.values
        paths = target_paths(model, values.get("target_modules"))
        excluded = values.get("exclude_modules")
        if excluded:
            left_out = set(target_paths(model, excluded))
            paths = [path for path in paths if path not in left_out]
        layers = values.get("layers_to_transform")
        if layers is not None:
            chosen = {str(layer) for layer in (layers if isinstance(layers, list) else [layers])}
            paths = [path for path in paths if path.startswith("blocks.") and path.split(".")[1] in chosen]
        if not paths:
            raise UserError(f"the settings of {self.name} leave no linear", found=values.get("target_modules"),
                            fix="a smaller exclude_modules, or other layers_to_transform")
        return paths

    def _put_constants(self, given: Mapping[str, Tensor]) -> None:
        if not given:
            return
        state = {name: tensor for name, tensor in self._own_state().items() if name not in self._trained}
        # what the package computes from the base need not be there: files of its own do not have it
        needed = {name: tensor for name, tensor in state.items() if name in given or not self._is_derived(name)}
        check_tensors(needed, given)
        _put(self._peft, given, resize=False)

    def _is_derived(self, name: str) -> bool:
        matched = _OF_A_LINEAR.match(name)
        return matched is not None and matched.group(2).partition(".")[0] in self.traits.derived

    def _own_state(self) -> dict[str, Tensor]:
        if self._peft is None:
            raise ContractError("the adapter is not on a model")
        return _full_state(self._peft, self._paths, self.traits)

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The tuner's parameters."""
        state = self._own_state()
        return {name: state[name] for name in self._trained}

    def constants(self, model: nn.Module) -> dict[str, Tensor]:
        """What the tuner holds beside its parameters."""
        constants = {name: tensor for name, tensor in self._own_state().items() if name not in self._trained}
        return {**constants, **(self._allocation.tensors() if self._allocation else {})}

    def file_traits(self) -> Traits:
        """What the attached tuner's files hold."""
        state = _state(self._peft)
        constant = {first_part(name) for name in self._own_state() if name not in self._trained}
        repeated = {first_part(name) for name in state.repeated()}
        return self.traits._replace(constant=frozenset(constant), repeated=frozenset(repeated))

    def hidden(self) -> dict[str, Tensor]:
        """See ``hidden_buffers``."""
        return hidden_buffers(self._peft, self._paths)

    def switch(self, model: nn.Module, *, on: bool) -> None:
        """Let the tuner's layers pass through to the base or not."""
        trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
        for path in self._paths:
            layer: Any = model.get_submodule(path)
            layer.enable_adapters(on)
        # the package freezes the parameters of layers it switches off
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """AdaLoRA shares out its ranks anew."""
        if self._allocation is not None:
            self._allocation.after_step(step, total_steps)

    # without a model

    def is_shared(self, name: str) -> bool:
        """Whether a file's tensor belongs to all linears."""
        return not name.startswith(_OF_THE_MODEL)

    def is_ours_alone(self, name: str) -> bool:
        """Whether the package's own files do not have the tensor ``name`` of ours."""
        return is_allocation_state(name) or first_part(name) in self.traits.derived

    def foreign_config(self, paths: list[str]) -> dict[str, Any]:
        """The package's settings for an adapter on the linears at ``paths``, as its own files have them."""
        values: dict[str, Any] = self.config.config(paths).to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
        return {**plain, "target_modules": paths}

    def sources(self, name: str) -> tuple[str, ...]:
        """The file's tensors for that linear and those all linears share."""
        own = self._of_linear.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return (*own, *self._shared) if own else ()

    def changes(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> bool:
        """Whether the file has tensors for that linear; their shapes are compared while merging."""
        return len(shape) == 2 and bool(self.sources(name))

    def merge(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The package's own merging, on this one linear.

        Raises: UserError if the file's tensors do not fit it.
        """
        sources = self.sources(name)
        if not sources:
            return None
        path = name.removesuffix(".weight")
        given = {**{source: self._given[source] for source in sources if source in self._given},
                 **{source: tensors[source] for source in sources if source in tensors}}
        given = {key: tensor for key, tensor in given.items() if not is_allocation_state(key)}
        skeleton = linears_by_path({path: base})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # the package draws values that the file's replace
            with torch.random.fork_rng(devices=[]):
                peft = _inject(self.config, skeleton, [path])
            state = _full_state(peft, [path], self.traits)
            own = {key: tensor for key, tensor in state.items() if key.startswith(f"{path}.")}
            needed = {key: tensor for key, tensor in own.items() if key in given or not self._is_derived(key)}
            check_tensors(needed, {key: tensor for key, tensor in given.items() if key.startswith(f"{path}.")})
            # shared tensors are as large as the largest linear wants them
            given = {key: tensor.to(base.device) for key, tensor in given.items() if key in state}
            _put(peft, given, resize=True)
            layer: Any = skeleton.get_submodule(path)
            layer.merge()
        merged: Tensor = layer.get_base_layer().weight.detach()
        return merged


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


def _state(peft: Any) -> State:
    names = import_module("peft").get_peft_model_state_dict(
        peft, state_dict=peft.state_dict(keep_vars=True), save_embedding_layers=False
    )
    return State(dict(names))


def _full_state(peft: Any, paths: Iterable[str], traits: Traits) -> dict[str, Tensor]:
    derived = {name: buffer for name, buffer in hidden_buffers(peft, paths).items()
               if first_part(name) in traits.derived}
    return {**_state(peft).canonical(), **derived}


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


def _put(peft: Any, given: Mapping[str, Tensor], *, resize: bool) -> None:
    """Copy values into a tuner; ``resize`` lets a tensor become another size."""
    state = _state(peft)
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


def _inject(config: TunerSettings, model: nn.Module, paths: list[str]) -> Any:
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


def _widen(layer: nn.Module) -> None:
    """Let a layer compute in fp32, as the weight of a quantised linear is, and answer in the dtype of its input."""
    dtype = torch.float32

    def widen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal dtype
        dtype = inputs[0].dtype
        return (inputs[0].float(), *inputs[1:])

    def narrow(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y.to(dtype)

    layer.register_forward_pre_hook(widen)
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
    matched = _OF_A_LINEAR.match(name)
    return (matched.group(2) if matched else name).partition(".")[0]


def linear_of(name: str) -> str | None:
    """The path of the linear an adapter's tensor belongs to; None if it belongs to all or to none."""
    matched = _OF_A_LINEAR.match(name)
    return matched.group(1) if matched else None

