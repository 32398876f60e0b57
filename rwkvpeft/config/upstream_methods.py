"""RWKV-PEFT's own ways to name a method and its settings, as ``--peft`` and ``--peft_config``.

Its releases had a settings flag per method (``--lora_config``, ``--pissa_config``, ...), the first ones a flag per
setting (``--lora --lora_r 8``), and ``--train_type state`` beside both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.methods import members

_SHARDS = ("miss", "disha", "bone", "bat")
_ADAPTED = {"att", "ffn"}


@dataclass(frozen=True)
class SettingsFlag:
    """One settings flag: its methods, upstream's default, and what its keys mean here.

    ``keys`` are settings of the method; ``load`` is ``--adapter``, ``init`` is ``--adapter_init``, ``mode`` the form of
    MiSS, ``parts`` what is adapted and trained.
    """

    methods: tuple[str, ...]
    default: Mapping[str, Any]
    keys: Mapping[str, str]
    load: str
    init: str = ""
    mode: str = ""
    parts: str = ""

    def known(self) -> list[str]:
        """Every key."""
        return [*self.keys, *(key for key in (self.load, self.init, self.mode, self.parts) if key)]


SETTINGS_FLAGS: dict[str, SettingsFlag] = {
    "lora_config": SettingsFlag(
        ("lora", "dora"),
        {"lora_load": "", "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.01},
        {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
        load="lora_load",
        parts="lora_parts",
    ),
    "pissa_config": SettingsFlag(
        ("pissa",),
        {"pissa_load": "", "pissa_init": "", "pissa_r": 8, "svd_niter": 4},
        {"pissa_r": "r", "svd_niter": "svd_niter"},
        load="pissa_load",
        init="pissa_init",
        parts="pissa_parts",
    ),
    "miss_config": SettingsFlag(
        _SHARDS, {"mode": "mode", "load": "", "r": 64}, {"r": "r"}, load="load", mode="mode"
    ),
    "disha_config": SettingsFlag(
        _SHARDS, {"mode": "mode", "load": "", "r": 64}, {"r": "r"}, load="load", mode="mode"
    ),
    "bone_config": SettingsFlag(
        _SHARDS,
        {"bone_mode": "mode", "bone_load": "", "bone_r": 64},
        {"bone_r": "r"},
        load="bone_load",
        mode="bone_mode",
    ),
}

_SINGLE = {
    "lora_r": ("r", ("lora", "dora", "pissa")),
    "lora_alpha": ("lora_alpha", ("lora", "dora")),
    "lora_dropout": ("lora_dropout", ("lora", "dora")),
    "svd_niter": ("svd_niter", ("pissa",)),
}
"""Flags of one setting: its name here and the methods that have it. Upstream's PiSSA takes LoRA's and ignores two."""

# fields that several flags can say a part of
_COMBINED = ("peft_config", "train_parts", "adapter", "adapter_init")


@dataclass
class _Told:
    """What the flags say so far: settings of the method, and fields of ours."""

    settings: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def chosen_method(given: Mapping[str, Any], findings: Findings) -> str | None:
    """The method that ``--peft`` and the older ways to say it name together; None if none does."""
    train_type = given.get("train_type") or "none"
    known = ["none", "state", "states", "infctx"]
    if train_type not in known:
        findings.add(f"--train_type {train_type}", found=train_type, expected=known)
    peft = given.get("peft")
    named = peft.lower() if peft else ""
    older = "pissa" if given.get("PISSA") else "lora" if given.get("lora") else ""
    if older and older not in members(named):
        if set(members(named)) - {"state"}:
            findings.add("two methods are asked for at once", found=sorted([named, older]), fix="give --peft alone")
        named = "+".join([older, *members(named)])
    if (train_type in ("state", "states") or given.get("state_tune")) and "state" not in members(named):
        named = "+".join([*members(named), "state"])
    return named or None


def translate_methods(
    upstream: Mapping[str, Any], fields: Mapping[str, Any], method: str, findings: Findings
) -> dict[str, Any]:
    """The fields that the settings flags among ``upstream`` set, for the run's ``method``.

    Args:
        fields: what was given under our own names, which wins.
    Returns: values by field name, those of ``fields`` that they stand in for included; ``peft`` among them only where
        a mode of MiSS changes the method.
    """
    told = _Told()
    for name, known in SETTINGS_FLAGS.items():
        if name in upstream:
            _read_settings_flag(name, known, upstream[name] or {}, method, told, findings)
    _read_single_flags(upstream, method, told, findings)
    if upstream.get("lora_load"):
        told.values["adapter"] = upstream["lora_load"]
    if "lora_parts" in upstream:
        _read_parts("lora_parts", upstream["lora_parts"], told, findings)
    values = {**told.values, **{name: fields[name] for name in _COMBINED if name in fields}}
    if upstream.get("emb"):
        values["train_parts"] = [*values.get("train_parts", ["time", "ln"]), "emb"]
    if told.settings:
        values["peft_config"] = {**told.settings, **values.get("peft_config", {})}
    return values


def _read_settings_flag(
    name: str, known: SettingsFlag, given: Mapping[str, Any], method: str, told: _Told, findings: Findings
) -> None:
    if unknown := [key for key in given if key not in known.known()]:
        findings.add(f"--{name} has unknown keys", found=unknown, expected=known.known())
    own = [member for member in members(method) if member in known.methods]
    if not own:
        # scripts hand on every method's settings, most of them untouched
        if any(value != known.default.get(key, "") for key, value in given.items()):
            findings.add(f"--{name} has no effect with --peft {method}", found=json.dumps(dict(given)),
                         fix=f"--peft {known.methods[0]}")
        return
    told.settings |= {ours: _as_number(given[key]) for key, ours in known.keys.items() if key in given}
    for key, ours in ((known.load, "adapter"), (known.init, "adapter_init")):
        if given.get(key):
            told.values[ours] = given[key]
    if known.parts in given:
        _read_parts(known.parts, given[known.parts], told, findings)
    if known.mode:
        _read_mode(f"{known.mode} of --{name}", given.get(known.mode, "mode"), own[0], method, told, findings)


def _read_mode(what: str, mode: Any, member: str, method: str, told: _Told, findings: Findings) -> None:
    if mode == "bat":
        told.values["peft"] = "+".join("bat" if name == member else name for name in members(method))
    elif mode not in ("", "mode", "miss", "disha", "bone"):
        findings.add(f"{what} is not known", found=mode, expected=["bone", "bat"])
    elif member == "bat" and mode not in ("", "mode"):
        findings.add("two methods are asked for at once", found=["bat", mode], fix="give --peft alone")


def _read_single_flags(upstream: Mapping[str, Any], method: str, told: _Told, findings: Findings) -> None:
    idle = []
    for name, (ours, methods) in _SINGLE.items():
        if name not in upstream:
            continue
        if set(members(method)) & set(methods):
            told.settings[ours] = _as_number(upstream[name])
        elif "pissa" not in members(method):
            idle.append(f"--{name}")
    if idle:
        findings.add(f"{', '.join(idle)}: no effect with --peft {method}", fix="--peft lora")


def _read_parts(name: str, parts: Any, told: _Told, findings: Findings) -> None:
    listed = [part.strip() for part in str(parts).split(",") if part.strip()]
    if missing := sorted(_ADAPTED - set(listed)):
        findings.add(f"{name} without {' and '.join(missing)} is not available", found=parts,
                     fix='--peft_config \'{"target_modules": ["att.key", "att.value"]}\'')
    base = [part for part in listed if part not in _ADAPTED]
    # PiSSA's parts were only ever those it adapts
    if base or name == "lora_parts":
        told.values["train_parts"] = base


def _as_number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value
