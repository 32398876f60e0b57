"""Which tuners of Hugging Face peft keep an adapter's promises: each is tried on a few small linears.

There is no list of good ones. A tuner must leave the model as it is at first, train only fp32 tensors that its file
holds, change the output, let itself be switched off, come back from its file, merge into a weight that computes the
same, answer in the dtype of its input, and treat a quantised weight like any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkvpeft.adapters.huggingface_adapter import PeftAdapter
from rwkvpeft.adapters.huggingface_layers import FAILURES, Traits, first_part, linears_by_path
from rwkvpeft.adapters.huggingface_settings import Tuner, TunerSettings, find_tuner, read_tuner_settings
from rwkvpeft.adapters.targets import replace_module
from rwkvpeft.errors import UserError
from rwkvpeft.quantization.format import Format
from rwkvpeft.quantization.linear import QuantizedLinear
from rwkvpeft.registry import FORMATS, find

# default block sizes and numbers of vectors go up to 256
_SIZES = {"blocks.0.att.key": (256, 256), "blocks.0.ffn.value": (256, 512), "blocks.1.att.key": (256, 256)}
_STEP_ZERO = 1e-4
_SAME = 1e-4
_CHANGED = 1e-4


class _Unsuitable(Exception):
    """Why a tuner cannot be used. ``by_size``: its settings do not go with the sizes of the trial."""

    def __init__(self, reason: str, *, by_size: bool = False) -> None:
        super().__init__(reason)
        self.by_size = by_size


class Verdict(NamedTuple):
    """What trying a tuner found: its traits, and settings it needs beyond its defaults."""

    traits: Traits
    needed: dict[str, Any]


def try_tuner(config: TunerSettings, given: Mapping[str, Any]) -> Verdict:
    """Try a tuner with these settings.

    Args:
        given: what a user wrote; other settings may be changed where the tuner needs it to start from the base.
    Raises: UserError with the reason if it breaks a promise.
    """
    tuner = config.tuner
    try:
        _check_kind(tuner)
        try:
            return _try(config, given)
        except _Unsuitable as reason:
            if not (reason.by_size and given):
                raise
            # sizes: the model at hand decides; what its files hold does not depend on them
            return _try(read_tuner_settings(tuner.name, {}), {})
    except _Unsuitable as reason:
        raise UserError(f"--peft {tuner.name} cannot be used on RWKV: {reason}", found=tuner.name,
                        fix="python train.py --help lists our own methods") from reason


@cache
def reason_against(name: str) -> str | None:
    """Why the installed package's method of that name cannot be used with its default settings; None if it can."""
    try:
        try_tuner(read_tuner_settings(name, {}), {})
    except UserError as reason:
        return reason.what.partition("cannot be used on RWKV: ")[2]
    return None


def _check_kind(tuner: Tuner) -> None:
    config = tuner.config
    names = set(getattr(config, "__dataclass_fields__", ()))
    if "num_virtual_tokens" in names:
        raise _Unsuitable("it trains virtual tokens at the input, not linears")
    if "adapter_layers" in names and "target_modules" in names:
        raise _Unsuitable("it adds a prompt inside softmax attention, which RWKV does not have")
    if "adapters" in names:
        raise _Unsuitable("it mixes adapters that are trained already")
    if "token_indices" in names:
        raise _Unsuitable("it trains rows of the embedding; --train_parts emb trains that")
    if "target_modules" not in names:
        raise _Unsuitable("it does not work on linears")
    if not hasattr(tuner.model, "inject_adapter"):
        raise _Unsuitable("it builds on the layers of transformers models")


def _try(config: TunerSettings, given: Mapping[str, Any]) -> Verdict:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        weights = {path: torch.randn(out, in_) / 16 for path, (out, in_) in _SIZES.items()}
        inputs = {path: torch.randn(2, 3, weight.shape[1]) for path, weight in weights.items()}
        needed: dict[str, Any] = {}
        trial = _Trial(config, weights, inputs)
        changed = trial.distance(trial.outputs(), trial.base_outputs())
        if changed > _STEP_ZERO and "init_weights" in config.values and "init_weights" not in given:
            # some start at random unless told to start from zero
            needed = {"init_weights": True}
            config = config._replace(values={**config.values, **needed})
            trial = _Trial(config, weights, inputs)
            changed = trial.distance(trial.outputs(), trial.base_outputs())
        if changed > _STEP_ZERO:
            raise _Unsuitable(f"its first values already change a linear's output, by {changed:.1g} of its size")
        return Verdict(trial.check(), needed)


class _Trial:
    """A tuner on a few linears.

    Args:
        weights: (out, in) by path.
        inputs: (2, 3, in) by path.
    """

    def __init__(
        self, config: TunerSettings, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor],
        traits: Traits = Traits(), change: Callable[[nn.Module], None] = lambda model: None,  # noqa: B008
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config._replace(values={**config.values, "target_modules": list(weights),
                                              "exclude_modules": None, "layers_to_transform": None})
        self.weights = weights
        self.inputs = inputs
        self.model = linears_by_path({path: weight.clone() for path, weight in weights.items()})
        # the package looks for some parameter of the model
        self.model.register_parameter("other", nn.Parameter(torch.zeros(1)))
        change(self.model)
        self.adapter = PeftAdapter(self.config, traits)
        rest = self.adapter.take_constants(tensors) if tensors is not None else None
        try:
            self.adapter.attach(self.model.eval())
        except UserError as reason:
            raise _Unsuitable(_first_sentence(str(reason.found or reason.what)), by_size=True) from reason
        if rest is not None:
            self.adapter.load(self.model, rest)

    def outputs(self) -> dict[str, Tensor]:
        try:
            return {path: self.model.get_submodule(path)(x) for path, x in self.inputs.items()}
        except FAILURES as reason:
            raise _Unsuitable(f"its layers cannot run as linears do ({_words(reason)})") from reason

    def base_outputs(self) -> dict[str, Tensor]:
        return {path: x @ self.weights[path].to(x.dtype).T for path, x in self.inputs.items()}

    def distance(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
        return max(
            float((found[path].float() - y.float()).abs().max() / y.float().abs().max())
            for path, y in expected.items()
        )

    def check(self) -> Traits:
        trained = self.adapter.own_tensors(self.model)
        self.check_trained(trained)
        traits = self._find_derived()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in trained.values():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        tuned = self.outputs()
        if self.distance(tuned, self.base_outputs()) < _CHANGED:
            raise _Unsuitable("what it trains does not change a linear's output")
        with self.adapter.disabled(self.model):
            if self.distance(self.outputs(), self.base_outputs()) > 0:
                raise _Unsuitable("it cannot be switched off")
        tensors = {name: tensor.detach().clone() for name, tensor in self.adapter.file_tensors(self.model).items()}
        self._check_file(tensors, traits, tuned)
        self._check_merge(tensors, traits, tuned)
        traits = self._check_quantised(trained, traits)
        self._check_half(traits)
        return traits

    def _find_derived(self) -> Traits:
        """Traits of a tuner fresh from its making: what other weights change was computed from the weights."""
        torch.manual_seed(0)
        same = _Trial(self.config, self.weights, self.inputs)
        torch.manual_seed(0)
        other = _Trial(self.config, {path: weight.flip(1) for path, weight in self.weights.items()}, self.inputs)
        buffers = other.adapter.hidden()
        parts = {first_part(name) for name, buffer in same.adapter.hidden().items()
                 if not torch.equal(buffer, buffers[name])}
        self.adapter.traits = self.adapter.traits._replace(derived=frozenset(parts))
        return self.adapter.file_traits()

    def check_trained(self, trained: Mapping[str, Tensor]) -> None:
        held = {id(tensor) for tensor in trained.values()}
        if not trained:
            raise _Unsuitable("it trains nothing on linears")
        if any(id(parameter) not in held for parameter in self.model.parameters() if parameter.requires_grad):
            raise _Unsuitable("its file does not hold all that it trains")
        if any(tensor.dtype != torch.float32 for tensor in trained.values()):
            raise _Unsuitable("what it trains is not floating-point numbers of 32 bits")

    def _check_file(self, tensors: Mapping[str, Tensor], traits: Traits, tuned: Mapping[str, Tensor]) -> None:
        torch.manual_seed(2)
        again = _Trial(self.config, self.weights, self.inputs, traits, tensors=tensors)
        if again.distance(again.outputs(), tuned) > 0:
            raise _Unsuitable("it does not come back exactly from its file")

    def _check_merge(self, tensors: Mapping[str, Tensor], traits: Traits, tuned: Mapping[str, Tensor]) -> None:
        adapter = PeftAdapter(self.config, traits)
        rest = adapter.take_constants(tensors)
        merged = {}
        for path, weight in self.weights.items():
            try:
                result = adapter.merge(f"{path}.weight", weight.clone(), rest)
            except FAILURES as reason:
                raise _Unsuitable(f"it cannot be merged into a weight ({_words(reason)})") from reason
            if result is None:
                raise _Unsuitable("a linear has no tensors of its own in its file, from which its weight could be made")
            merged[path] = self.inputs[path] @ result.T
        distance = self.distance(merged, tuned)
        if not distance < _SAME:
            raise _Unsuitable(f"merged one weight at a time it differs from what was trained, by {distance:.1g} of it")

    def _check_half(self, traits: Traits) -> None:
        weights = {path: weight.to(torch.bfloat16) for path, weight in self.weights.items()}
        inputs = {path: x.to(torch.bfloat16).requires_grad_() for path, x in self.inputs.items()}
        half = _Trial(self.config, weights, inputs, traits)
        half.run_as_trained("bf16")
        half.check_trained(half.adapter.own_tensors(half.model))

    def _check_quantised(self, trained: Mapping[str, Tensor], traits: Traits) -> Traits:
        """Returns the traits, with what a quantised weight needs."""
        inputs = {path: x.to(torch.bfloat16).requires_grad_() for path, x in self.inputs.items()}

        def run(traits: Traits) -> None:
            quantised = _Trial(self.config, self.weights, inputs, traits, change=_quantise)
            if quantised.adapter.own_tensors(quantised.model).keys() != trained.keys():
                raise _Unsuitable("it trains a copy of the weight itself, which a quantised base does not offer")
            quantised.run_as_trained("a quantised weight")

        try:
            run(traits)
        except _Unsuitable:
            traits = traits._replace(needs_wide_input=True)
            run(traits)
        return traits

    def run_as_trained(self, what: str) -> None:
        """Forward and backward; the output must be of the input's dtype."""
        for path, y in self.outputs().items():
            if y.dtype != self.inputs[path].dtype:
                raise _Unsuitable(f"with {what} it answers in {y.dtype} instead of {self.inputs[path].dtype}")
            y.float().square().sum().backward()
        if not all(tensor.grad is not None for tensor in self.adapter.own_tensors(self.model).values()):
            raise _Unsuitable(f"with {what} some of what it trains gets no gradient")


def _quantise(model: nn.Module) -> None:
    format: Format = find(FORMATS, "fp8", flag="--quant")()
    for path in _SIZES:
        weight: Any = model.get_submodule(path).weight
        replace_module(model, path, QuantizedLinear.from_weight(weight.detach(), format))


def _words(reason: Exception) -> str:
    return _first_sentence(str(reason).strip() or type(reason).__name__)


def _first_sentence(words: str) -> str:
    return words.strip().splitlines()[0].partition(". ")[0].rstrip(".")


def trial_of(name: str, settings: Mapping[str, Any]) -> tuple[TunerSettings, Verdict]:
    """A method of the package with a user's settings, tried.

    Raises: UserError as ``find_tuner``, ``read_tuner_settings`` and ``try_tuner``.
    """
    find_tuner(name)
    config = read_tuner_settings(name, settings)
    verdict = try_tuner(config, settings)
    return config._replace(values={**config.values, **verdict.needed}), verdict
