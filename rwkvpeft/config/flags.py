"""A dataclass field becomes a flag.

``flag`` declares default, help, choices and unit in one place; the parser, ``--help``, ``config.yaml`` and the
checks are made from the declaration.
"""

from __future__ import annotations

import types
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Kind = Literal["text", "whole", "number", "switch", "json", "words"]
"""What a flag takes: a string, an int, a float, nothing or true/false, a JSON object, or several words."""

_KINDS: dict[object, Kind] = {str: "text", int: "whole", float: "number", bool: "switch", dict: "json", list: "words"}


def flag(
    default: Any,
    *,
    help: str,
    choices: Collection[str] | None = None,
    unit: str = "",
    alias: str = "",
    metavar: str = "",
) -> Any:
    """Declare a dataclass field that is also a command-line flag named after it.

    Args:
        default: value when the flag is not given. A list or dict is copied for each instance.
        help: one sentence for ``--help``.
        choices: allowed values, in the order to show them.
        unit: what the number counts, shown beside the default.
        alias: a second flag name with the same meaning, without dashes.
        metavar: placeholder shown in ``--help``.
    """
    metadata = {"help": help, "choices": choices, "unit": unit, "alias": alias, "metavar": metavar}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FlagSpec:
    """One flag as its field declares it; ``optional`` means that None, "chosen later", is a value."""

    name: str
    kind: Kind
    default: Any
    optional: bool = False
    help: str = ""
    choices: tuple[str, ...] = ()
    unit: str = ""
    alias: str = ""
    metavar: str = ""

    @property
    def option(self) -> str:
        """The flag as it is typed."""
        return f"--{self.name}"


def specs(group: type) -> list[FlagSpec]:
    """The flags a settings dataclass declares, in the order of its fields. Fields without ``flag`` are left out."""
    hints = get_type_hints(group)
    return [
        FlagSpec(
            name=item.name,
            kind=_kind(hints[item.name])[0],
            optional=_kind(hints[item.name])[1],
            default=item.default if item.default_factory is MISSING else item.default_factory(),
            help=item.metadata["help"],
            choices=tuple(item.metadata["choices"] or ()),
            unit=item.metadata["unit"],
            alias=item.metadata["alias"],
            metavar=item.metadata["metavar"],
        )
        for item in fields(group)
        if "help" in item.metadata
    ]


def _kind(annotation: Any) -> tuple[Kind, bool]:
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    core = [member for member in members if member is not type(None)]
    plain = get_origin(core[0]) or core[0]
    if len(core) != 1 or plain not in _KINDS:
        raise TypeError(f"a flag cannot have the type {annotation}")
    return _KINDS[plain], len(members) > 1
