"""Any tuner of Hugging Face peft that works on linears, as one of our adapters.

Tensors in files have the package's own names without the parts it puts in front: ``blocks.0.att.key.vera_lambda_b``,
and ``vera_A`` for what all linears share. Trained tensors are fp32. What is not trained but was drawn at random or
computed from the base (VeRA's matrices, SHiRA's places, PSOFT's directions) is a constant of the file, once even where
the package would repeat it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter, check_tensors
from rwkvpeft.adapters.huggingface_layers import (
    OF_A_LINEAR,
    Traits,
    first_part,
    full_state,
    hidden_buffers,
    inject,
    linears_by_path,
    put_values,
    short_name,
    state_of,
    widen,
)
from rwkvpeft.adapters.huggingface_settings import TunerSettings
from rwkvpeft.adapters.rank_allocation import RankAllocation, is_allocation_state
from rwkvpeft.adapters.targets import target_paths
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.models.layers import Linear

_OF_THE_MODEL = ("blocks.", "head.", "emb.", "ln_out.")


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
            matched = OF_A_LINEAR.match(name)
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
        self._peft = inject(self.config, model, self._paths)
        for path in self._paths:
            layer: Any = model.get_submodule(path)
            if not hasattr(layer, "base_layer"):
                raise UserError(f"{self.name} left {path} as it is", fix="another target_modules")
            # the package makes layers that train
            layer.train(training[path])
            if self.traits.needs_wide_input and not isinstance(layer.get_base_layer(), Linear):
                widen(layer)
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
        put_values(self._peft, given, resize=False)

    def _is_derived(self, name: str) -> bool:
        matched = OF_A_LINEAR.match(name)
        return matched is not None and matched.group(2).partition(".")[0] in self.traits.derived

    def _own_state(self) -> dict[str, Tensor]:
        if self._peft is None:
            raise ContractError("the adapter is not on a model")
        return full_state(self._peft, self._paths, self.traits)

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
        state = state_of(self._peft)
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
                peft = inject(self.config, skeleton, [path])
            state = full_state(peft, [path], self.traits)
            own = {key: tensor for key, tensor in state.items() if key.startswith(f"{path}.")}
            needed = {key: tensor for key, tensor in own.items() if key in given or not self._is_derived(key)}
            check_tensors(needed, {key: tensor for key, tensor in given.items() if key.startswith(f"{path}.")})
            # shared tensors are as large as the largest linear wants them
            given = {key: tensor.to(base.device) for key, tensor in given.items() if key in state}
            put_values(peft, given, resize=True)
            layer: Any = skeleton.get_submodule(path)
            layer.merge()
        merged: Tensor = layer.get_base_layer().weight.detach()
        return merged
