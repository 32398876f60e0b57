"""Names and settings of adapters in Hugging Face peft's format, and ours, in both directions.

=========  =================================================  =================================
method     there                                              here
=========  =================================================  =================================
lora       ``base_model.model.<path>.lora_A.weight``, lora_B  ``<path>.lora_A``, lora_B
dora       and ``base_model.model.<path>.lora_magnitude_vector``  ``<path>.lora_magnitude_vector``
miss       ``base_model.model.<path>.miss_block``             ``<path>.miss``
others     ``base_model.model.<path>.<theirs>``               ``<path>.<theirs>``
others     ``base_model.<shared by all linears>``             ``<shared by all linears>``
=========  =================================================  =================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvpeft.adapters.targets import few
from rwkvpeft.adapters.trained_parts import PARTS
from rwkvpeft.errors import UserError

_IN_MODEL = "base_model.model."
_ON_TUNER = "base_model."
_LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
_MISS = {"miss": "miss_block"}
_SAVED_MODULE = re.compile(r"(^|\.)(ln\d|ln_x|ln_out|emb|head)\.(weight|bias)$")

_HOMELESS = re.compile(PARTS["time"])

# settings of LoRA and MiSS that say where the adapter is and how it began, not what it computes
_SILENT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "miss_dropout", "mini_r", "init_weights",
    "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "ensure_weight_tying",
}
_OWN_START = (True, False, "gaussian", "orthogonal", "eva", "loftq")
"""Starts of LoRA that leave the base's weights as they are. (LoftQ's base is quantised, which we do not take over.)"""


class Foreign(NamedTuple):
    """An adapter in peft's terms: its config, its tensors, and what that format has no place for, by our names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    extras: dict[str, Tensor]


def to_foreign(
    method: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], *, set_aside: bool = False
) -> Foreign:
    """An adapter of ours in peft's terms.

    Args:
        set_aside: trained parts of the base that have no place there become ``extras``.
    Raises: UserError if the method, or something trained beside it, does not exist there.
    """
    saved = {name: tensor for name, tensor in tensors.items() if _SAVED_MODULE.search(name)}
    homeless = {name: tensor for name, tensor in tensors.items() if has_no_place(name)}
    if homeless and not set_aside:
        raise UserError(
            f"the adapter has {len(homeless)} trained tensors that Hugging Face's format has no place for",
            found=few(list(homeless)),
            expected="the adapter's own, and norms, embedding and head as whole modules",
            fix="python merge.py, which folds everything into the model, or --set_aside",
        )
    own = {name: tensor for name, tensor in tensors.items() if name not in saved and name not in homeless}
    if method in ("lora", "dora"):
        foreign = _lora_to_foreign(method, settings, own)
    elif method == "miss":
        foreign = _miss_to_foreign(settings, own)
    elif method == "bat":
        raise UserError(
            "a Bat adapter has no place in Hugging Face's format",
            found="blocks by input columns, as RWKV-PEFT trains them",
            expected="MiSS; peft's own bat takes blocks by output rows, which is another method",
            fix="python merge.py",
        )
    elif method in ("none", "state", "profile", "pissa") or "+" in method:
        raise UserError(f"--peft {method} has no place in Hugging Face's format", expected=_CONVERTIBLE,
                        fix="python merge.py")
    else:
        foreign = _tuner_to_foreign(method, settings, own)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in saved))
    return foreign._replace(
        config={**foreign.config, "modules_to_save": modules or None},
        tensors={**foreign.tensors, **{f"{_IN_MODEL}{name}": tensor for name, tensor in saved.items()}},
        extras={**foreign.extras, **homeless},
    )


_CONVERTIBLE = "lora, dora, miss, or a method of Hugging Face peft"


def has_no_place(name: str) -> bool:
    """Whether the base's parameter ``name`` stands in no module of its own, so that peft cannot save it."""
    return _HOMELESS.search(name) is not None


def from_foreign(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Method, settings and tensors of ours for an adapter of peft's.

    Raises: UserError if it computes something ours cannot.
    """
    kind = str(config.get("peft_type", "")).upper()
    plain = {name.removeprefix(_IN_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_IN_MODEL)}
    shared = {name.removeprefix(_ON_TUNER): tensor for name, tensor in tensors.items()
              if not name.startswith(_IN_MODEL)}
    modules = config.get("modules_to_save") or []
    saved = {name: tensor for name, tensor in plain.items() if _is_saved(name, modules)}
    own = {name: tensor for name, tensor in plain.items() if name not in saved}
    if kind == "LORA":
        method, settings, ours = _lora_from_foreign(config, {**own, **shared})
    elif kind == "MISS":
        method, settings, ours = _miss_from_foreign(config, {**own, **shared})
    elif kind:
        method, settings, ours = _tuner_from_foreign(kind.lower(), config, own, shared)
    else:
        raise UserError("the adapter's config does not name its method", expected="a key peft_type")
    return method, settings, {**ours, **saved}


def _is_saved(name: str, modules: list[str]) -> bool:
    path = name.rpartition(".")[0]
    return any(path == module or path.endswith("." + module) for module in modules)


def _lora_to_foreign(method: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Foreign:
    named, paths = _renamed(tensors, _LORA)
    config = {
        "peft_type": "LORA", "r": _rank(tensors, "lora_A"), "lora_alpha": settings["lora_alpha"],
        "lora_dropout": settings["lora_dropout"], "use_rslora": settings.get("use_rslora", False),
        "use_dora": method == "dora", "target_modules": paths, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    return Foreign(config, named, {})


def _miss_to_foreign(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Foreign:
    named, paths = _renamed(tensors, _MISS)
    columns = settings.get("mini_r", 0)
    config = {
        "peft_type": "MISS", "r": _rank(tensors, "miss"), "mini_r": columns or 1,
        "miss_dropout": settings.get("miss_dropout", 0.0), "target_modules": paths, "bias": "none",
        "init_weights": "mini" if columns else True,
    }
    return Foreign(config, named, {})


def _renamed(tensors: Mapping[str, Tensor], parts: Mapping[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    named, paths = {}, []
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if part not in parts:
            raise UserError("the adapter has a tensor that is not of its method", found=name, expected=list(parts))
        named[f"{_IN_MODEL}{path}.{parts[part]}"] = tensor
        paths.append(path)
    return named, list(dict.fromkeys(paths))


def _rank(tensors: Mapping[str, Tensor], part: str) -> int:
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.rpartition(".")[2] == part}
    if len(ranks) != 1:
        raise UserError("the adapter's linears differ in rank", found=few(sorted(map(str, ranks))) or "no rank",
                        expected="one rank")
    return ranks.pop()


def _lora_from_foreign(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    _refuse_unknown(config, "LoRA")
    start = config.get("init_lora_weights", True)
    if start not in _OWN_START:
        raise UserError("the adapter was trained on changed weights of its base", found=f"init_lora_weights {start}",
                        expected=[str(known) for known in _OWN_START],
                        fix="save it with peft's path_initial_model_for_weight_conversion")
    ours = _our_names(tensors, _LORA)
    method = "dora" if config.get("use_dora") else "lora"
    parts = [*_LORA][: 3 if method == "dora" else 2]
    settings = {
        "r": _rank(ours, "lora_A"), "lora_alpha": config.get("lora_alpha", 8),
        "lora_dropout": config.get("lora_dropout", 0.0), "use_rslora": bool(config.get("use_rslora", False)),
        "target_modules": _whole_linears(ours, parts),
    }
    if settings["r"] != config.get("r", 8):
        raise UserError("the adapter's tensors disagree with its config", found=f"rank {settings['r']}",
                        expected=f"r {config.get('r', 8)}")
    return method, settings, ours


def _miss_from_foreign(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    _refuse_unknown(config, "MiSS")
    start = config.get("init_weights", True)
    if start == "bat":
        raise UserError(
            "the adapter is Hugging Face's form of Bat, whose blocks go by output rows",
            expected="MiSS; ours, as RWKV-PEFT's, takes blocks by input columns, which is another method",
        )
    ours = _our_names(tensors, _MISS)
    columns = {tensor.shape[1] for tensor in ours.values()} if start == "mini" else {0}
    settings = {"r": _rank(ours, "miss"), "mini_r": columns.pop(), "miss_dropout": config.get("miss_dropout", 0.0),
                "target_modules": _whole_linears(ours, [*_MISS])}
    return "miss", settings, ours


def _refuse_unknown(config: Mapping[str, Any], method: str) -> None:
    active = [
        f"{key} {value}" for key, value in config.items()
        if key not in _SILENT and value not in (None, False, "none") and value != {} and value != []
    ]
    if active:
        raise UserError(f"the adapter uses a form of {method} that is not known here", found=few(active),
                        expected="plain LoRA, rsLoRA, DoRA or MiSS")


def _our_names(tensors: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in tensors.items():
        part = next((part for part, theirs in parts.items() if name.endswith(f".{theirs}")), None)
        if part is None:
            raise UserError("the adapter has a tensor that is not known here", found=name,
                            expected=[f"names ending in {theirs}" for theirs in parts.values()])
        ours[f"{name.removesuffix('.' + parts[part])}.{part}"] = tensor
    return ours


def _whole_linears(ours: Mapping[str, Tensor], parts: list[str]) -> list[str]:
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in ours))
    missing = [f"{path}.{part}" for path in paths for part in parts if f"{path}.{part}" not in ours]
    surplus = [name for name in ours if name.rpartition(".")[2] not in parts]
    if missing or surplus:
        raise UserError("the adapter's tensors disagree with its config",
                        found=few([f"no {name}" for name in missing] + surplus), expected=parts)
    return paths


def _tuner_to_foreign(method: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Foreign:
    from rwkvpeft.adapters.huggingface import linear_of, peft_adapter

    adapter = peft_adapter(method, settings)
    named: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    paths = list(dict.fromkeys(path for name in tensors if (path := linear_of(name))))
    for name, tensor in tensors.items():
        if adapter.is_ours_alone(name):
            extras[name] = tensor
        elif linear_of(name):
            named[f"{_IN_MODEL}{name}"] = tensor
        elif adapter.is_shared(name):
            named[f"{_ON_TUNER}{name}"] = tensor
            if name in adapter.traits.repeated:
                named |= {f"{_IN_MODEL}{path}.{name}": tensor for path in paths}
        else:
            raise UserError("the adapter has a tensor that is not of its method", found=name)
    return Foreign(adapter.foreign_config(paths), named, extras)


def _tuner_from_foreign(
    method: str, config: Mapping[str, Any], own: Mapping[str, Tensor], shared: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    from rwkvpeft.adapters.huggingface import linear_of, peft_adapter

    if method == "adalora" and config.get("rank_pattern"):
        raise UserError("the adapter's linears differ in rank", found="AdaLoRA's rank_pattern",
                        expected="one rank for all", fix="merge it with peft")
    paths = list(dict.fromkeys(path for name in own if (path := linear_of(name))))
    # the tensors tell where the adapter is
    where = {"modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"}
    settings = {key: value for key, value in config.items() if key not in where}
    adapter = peft_adapter(method, {**settings, "target_modules": paths})
    ours = dict(shared)
    for name, tensor in own.items():
        path = linear_of(name)
        if path is None:
            raise UserError("the adapter has a tensor that is not known here", found=name)
        part = name.removeprefix(f"{path}.")
        if part not in adapter.traits.repeated:
            ours[name] = tensor
        elif part not in ours or not torch.equal(ours[part], tensor):
            raise UserError(f"the copies of {part} in the adapter differ", found=name)
    return method, adapter.settings(), ours
