"""The tuners of the installed Hugging Face peft: finding one by name, and reading its settings.

Nothing is imported from that package until a name is looked up: it takes seconds, and it is an extra.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, make_dataclass
from dataclasses import field as new_field
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from rwkvpeft.errors import UserError
from rwkvpeft.quantization.library import without_remarks

# what an adapter_config.json says about itself and its model; it changes nothing
_BOOKKEEPING = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "use_effective_conv2d",
)
_NO_BIAS = "RWKV's linears have no bias"
_ONLY_TRANSFORMERS = "it belongs to models of the transformers library"
_OUTSIDE = {
    "modules_to_save": "parts of the base are trained by --train_parts",
    "bias": _NO_BIAS,
    "lora_bias": _NO_BIAS,
    "fan_in_fan_out": "RWKV's weights are all (out, in)",
    "layers_pattern": "layers are counted by blocks alone",
    "layer_replication": "every layer has its own weights",
    "target_parameters": "only linears are adapted",
    "trainable_token_indices": "tokens are trained by --train_parts emb",
    "ensure_weight_tying": "no weights are tied",
    "megatron_config": _ONLY_TRANSFORMERS,
    "megatron_core": _ONLY_TRANSFORMERS,
    "runtime_config": _ONLY_TRANSFORMERS,
    "orth_reg_weight": "nothing is added to the training loss",
    "runtime_offload_base_weight": "the base stays where it is",
}
"""Settings that have no meaning here, and why; their defaults are passed over."""
_FIXED = {
    "save_projection": True,
    "save_indices": True,
    "save_precomputed_indices": True,
    "save_only_topk_weights": False,
    "progressbar": False,
}
"""An adapter file holds all that merging and going on need."""
STEPS_UNKNOWN = 10**9
"""AdaLoRA's settings want a number of steps before a run has one."""
_IA3_INPUT_SIDE = ["ffn.value"]


class Tuner(NamedTuple):
    """One method of the package: its name in small letters, its model class and its settings' dataclass."""

    name: str
    model: Any
    config: Any


class TunerSettings(NamedTuple):
    """A tuner and all its settings, defaults included, as plain values."""

    tuner: Tuner
    values: dict[str, Any]

    def config(self, paths: Sequence[str]) -> Any:
        """The package's own settings object, for the linears at ``paths``.

        Raises: what the package raises for values it cannot take.
        """
        values = {**self.values, "target_modules": list(paths)}
        # already applied to the paths: the package reads layer numbers from other names than blocks.0
        for name in ("exclude_modules", "layers_to_transform"):
            values.pop(name, None)
        wanted = values.get("feedforward_modules")
        if wanted is not None:
            values["feedforward_modules"] = [path for path in paths if any(_ends(path, name) for name in wanted)]
        if values.get("total_step", 0) is None:
            values["total_step"] = STEPS_UNKNOWN
        return self.tuner.config(**values)


def library() -> Any:
    """The package itself.

    Raises: UserError if it is not installed.
    """
    try:
        # it imports bitsandbytes where that is installed
        with without_remarks():
            return import_module("peft")
    except ImportError as reason:
        raise UserError("this method needs Hugging Face peft", found=str(reason), fix="pip install 'rwkvpeft[peft]'") \
            from reason


def tuner_names() -> list[str]:
    """Every method the installed package registers, those that do not work on linears included."""
    library()
    return sorted(kind.value.lower() for kind in import_module("peft.mapping").PEFT_TYPE_TO_TUNER_MAPPING)


def find_tuner(name: str) -> Tuner:
    """The method of that name, in whatever letters.

    Raises: UserError if the package is missing or has no such method.
    """
    library()
    mapping = import_module("peft.mapping")
    for kind, model in mapping.PEFT_TYPE_TO_TUNER_MAPPING.items():
        if kind.value.lower() == name.strip().lower():
            return Tuner(kind.value.lower(), model, mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind])
    known = tuner_names()
    near = difflib.get_close_matches(name.lower(), known, n=1)
    raise UserError(f"--peft does not know {name!r}", found=name, expected=known,
                    fix=f"--peft {near[0]}" if near else None)


def method_settings(name: str) -> type:
    """A dataclass of the settings ``--peft_config`` takes for the method, with the package's help texts.

    Raises: UserError as ``find_tuner``.
    """
    tuner = find_tuner(name)
    items = [
        (item.name, Any, new_field(default_factory=partial(_default, item), metadata=dict(item.metadata)))
        for item in _usable(tuner)
    ]
    return make_dataclass(f"{tuner.config.__name__}ForLinears", items, frozen=True)


def read_tuner_settings(name: str, settings: Mapping[str, Any]) -> TunerSettings:
    """Complete what a user wrote in ``--peft_config``.

    Raises: UserError for an unknown method, an unknown key, or a key that has no meaning here.
    """
    tuner = find_tuner(name)
    everything = {item.name: item for item in fields(tuner.config) if item.init}
    usable = {item.name for item in _usable(tuner)}
    values = {item.name: _default(item) for item in _usable(tuner)}
    if "feedforward_modules" in values:
        values["feedforward_modules"] = _IA3_INPUT_SIDE
    fixed = {name: value for name, value in _FIXED.items() if name in everything}
    for key, value in settings.items():
        if key in usable:
            values[key] = _names(value) if key.endswith("_modules") else value
            if key == "total_step" and value == STEPS_UNKNOWN:
                values[key] = None
        elif key in _BOOKKEEPING:
            continue
        elif key in fixed:
            if value != fixed[key]:
                raise UserError(f"{key} of {tuner.name} cannot be changed", found=value, expected=fixed[key],
                                fix="leave it out: adapter files hold all that merging and going on need")
        elif key in everything:
            if value != _default(everything[key]):
                reason = _OUTSIDE.get(key, "it cannot be written as json")
                raise UserError(f"{key} of {tuner.name} has no meaning here: {reason}", found=value,
                                fix="leave it out")
        else:
            near = difflib.get_close_matches(key, sorted(usable), n=1)
            raise UserError(f"--peft_config has a key that {tuner.name} does not know", found=key,
                            expected=sorted(usable), fix=f"write {near[0]}" if near else None)
    return TunerSettings(tuner, {**values, **fixed})


def _usable(tuner: Tuner) -> list[Field[Any]]:
    passed_over = {*_BOOKKEEPING, *_OUTSIDE, *_FIXED}
    return [
        item for item in fields(tuner.config)
        if item.init and item.name not in passed_over and _is_plain(_default(item))
    ]


def _default(item: Field[Any]) -> Any:
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else None


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _names(value: Any) -> Any:
    """``--peft_config`` takes names as a list or joined with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise UserError("names of linears cannot be read", found=value, expected="a list of names")
    return value


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)
