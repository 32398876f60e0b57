"""From the name of a method and its settings to an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.adapters.combined import CombinedAdapter
from rwkvpeft.adapters.profile import ProfileAdapter
from rwkvpeft.adapters.settings import PissaConfig
from rwkvpeft.adapters.state import BESIDE_OTHERS
from rwkvpeft.adapters.targets import few
from rwkvpeft.errors import UserError
from rwkvpeft.registry import ADAPTERS, find


def build_adapter(method: str, settings: Mapping[str, Any], train_parts: Iterable[str] = ()) -> Adapter | None:
    """The adapter named by ``--peft``; None for ``none``, full training.

    ``METHOD+state`` tunes the states beside METHOD; the key ``state`` of the settings holds theirs. A name that is not
    ours is looked up in Hugging Face peft.
    Raises: UserError if the method, a setting or a part is unknown.
    """
    if method == "none":
        if settings:
            raise UserError("--peft_config has no effect without an adapter", found=sorted(settings), fix="--peft lora")
        return None
    if method == "profile":
        return ProfileAdapter.from_settings(settings, train_parts)
    if "+" in method:
        return _with_state(method, settings, train_parts)
    if method == "lora":
        method, settings = _member_of_the_lora_family(settings)
    if method in ADAPTERS:
        adapter: Adapter = find(ADAPTERS, method, flag="--peft").from_settings(settings, train_parts)
        return adapter
    from rwkvpeft.adapters.huggingface import peft_adapter

    return peft_adapter(method, settings, train_parts)


def _with_state(method: str, settings: Mapping[str, Any], train_parts: Iterable[str]) -> CombinedAdapter:
    names = [name.strip() for name in method.split("+")]
    others = [name for name in names if name != "state"]
    if len(names) != 2 or len(others) != 1 or others[0] in ("", "none"):
        raise UserError("--peft combines one method with state", found=method, expected="METHOD+state")
    own = {key: value for key, value in settings.items() if key != "state"}
    state = settings.get("state", {})
    if not isinstance(state, Mapping):
        raise UserError("state in --peft_config must hold the settings of the states", found=state,
                        expected='{"token_shift": true, "lr_init": 1}')
    members = [build_adapter(others[0], own), build_adapter("state", {**BESIDE_OTHERS, **state})]
    built = [member for member in members if member is not None]
    both = {**built[0].settings(), "state": built[1].settings()}
    return CombinedAdapter(f"{built[0].name}+state", built, both, train_parts)


def _member_of_the_lora_family(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Hugging Face peft's keys that turn LoRA into another of our methods."""
    own = dict(settings)
    start = own.pop("init_lora_weights", True)
    dora = own.pop("use_dora", False)
    if isinstance(start, str) and start.startswith("pissa"):
        # PiSSA has neither: an alpha equal to the rank, and no dropout, are how that package says so
        idle = {"lora_alpha": own.get("r", PissaConfig.r), "lora_dropout": 0}
        own = {key: value for key, value in own.items() if key not in idle or value != idle[key]}
        niter = start.removeprefix("pissa").removeprefix("_niter_")
        return "pissa", {**own, **({"svd_niter": int(niter)} if niter.isdigit() else {})}
    if start is not True:
        raise UserError("init_lora_weights is not known here", found=start, expected=[True, "pissa", "pissa_niter_4"])
    return ("dora" if dora else "lora"), own


def recognise(tensors: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Any]]:
    """Tell method and settings of an adapter file without a recipe from its tensors.

    Settings that tensors do not tell (LoRA's alpha) have their defaults.
    Raises: UserError if the names are those of no method of ours.
    """
    for method in ("state", "dora", "pissa", "lora", "bat", "miss"):
        kind = find(ADAPTERS, method, flag="method")
        if kind.recognises(tensors):
            return method, kind().file_settings(kind().rename(tensors))
    raise UserError(
        f"{source} has no recipe beside it and no tensor name of a known method",
        found=few(list(tensors)),
        expected="names ending in .lora_A and .lora_B, .miss, .disha, or .time_state",
    )
