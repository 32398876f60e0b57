"""A dataclass field becomes a flag.

``flag`` declares default, help, choices and unit in one place; the parser, ``--help``, ``config.yaml`` and the
checks are made from the declaration.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import field
from typing import Any


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
