"""Tables of contents: every named choice and the file that holds it.

A table maps a name a user types to ``"module:attribute"``. Nothing is imported until a name is looked up, so
``--help`` costs nothing. To add a part, write its file and add its line here; the contract tests run over these tables.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rwkvpeft.errors import UserError

MODELS: dict[str, str] = {
    "x052": "rwkvpeft.models.rwkv5:Rwkv5",
    "x060": "rwkvpeft.models.rwkv6:Rwkv6",
    "x070": "rwkvpeft.models.rwkv7:Rwkv7",
}

BACKENDS: dict[str, dict[str, str]] = {
    "wkv5": {"torch": "rwkvpeft.ops.wkv5.chunked:BACKEND", "reference": "rwkvpeft.ops.wkv5.reference:BACKEND"},
    "wkv6": {"torch": "rwkvpeft.ops.wkv6.chunked:BACKEND", "reference": "rwkvpeft.ops.wkv6.reference:BACKEND"},
    "wkv7": {"torch": "rwkvpeft.ops.wkv7.chunked:BACKEND", "reference": "rwkvpeft.ops.wkv7.reference:BACKEND"},
}

ADAPTERS: dict[str, str] = {
    "lora": "rwkvpeft.adapters.lora:LoraAdapter",
    "state": "rwkvpeft.adapters.state:StateAdapter",
}

OBJECTIVES: dict[str, str] = {
    "language_modelling": "rwkvpeft.objectives.language_modelling:LanguageModelling",
}

SOURCES: dict[str, str] = {
    "binidx": "rwkvpeft.data.binidx:open_binidx",
    "jsonl": "rwkvpeft.data.jsonl:open_jsonl",
}

OPTIMIZERS: dict[str, str] = {
    "adam": "rwkvpeft.training.optimizers:build_adam",
    "adamw": "rwkvpeft.training.optimizers:build_adamw",
}

SCHEDULES: dict[str, str] = {
    "cos": "rwkvpeft.training.schedules:cosine",
    "cos_decay": "rwkvpeft.training.schedules:cosine",
    "wsd": "rwkvpeft.training.schedules:warmup_stable_decay",
    "exp": "rwkvpeft.training.schedules:exponential",
    "linear": "rwkvpeft.training.schedules:linear",
}


def find(table: Mapping[str, str], name: str, *, flag: str) -> Any:
    """Import and return what ``table`` lists under ``name``.

    Args:
        flag: the flag the name came from, for the message.
    Raises:
        UserError: the table has no such name; known names and the nearest one are given.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        fix = f"{flag} {near[0]}" if near else None
        raise UserError(f"{flag} does not know {name!r}", found=name, expected=sorted(table), fix=fix)
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
