"""Settings in YAML: what ``--config`` reads, and the ``config.yaml`` a run leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rwkvpeft.atomic import write_whole
from rwkvpeft.config.findings import Findings, nearest
from rwkvpeft.config.flags import FlagSpec
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.yaml_text import parse_yaml
from rwkvpeft.errors import UserError
from rwkvpeft.reading import LARGEST_SETTINGS_BYTES, read_text

_LOOKED_UP = 20


def read_flat(path: Path, groups: Mapping[str, type], spec_of: Callable[[str], FlagSpec | None]) -> dict[str, Any]:
    """Read a YAML file whose keys are flag names, at the top or under the names of their groups.

    Args:
        groups: names that may hold a mapping of flags.
        spec_of: finds a flag by name, alias included.
    Returns: raw values by field name.
    Raises: UserError if the file is missing or not YAML, has an unknown key or gives one flag twice.
    """
    findings = Findings()
    values: dict[str, Any] = {}
    for key, value in _flat(_load(path), groups):
        spec = spec_of(key.rpartition(".")[2])
        if spec is None:
            known = [name for group in groups.values() for name in group.__dataclass_fields__]  # type: ignore[attr-defined]
            # to look for what was meant takes milliseconds a key
            near = nearest(key.rpartition(".")[2], known) if len(findings.errors) < _LOOKED_UP else None
            findings.add(f"{path} has an unknown key", found=key, fix=near)
        elif spec.name in values:
            findings.add(f"{path} gives {spec.name} twice", found=[values[spec.name], value])
        else:
            values[spec.name] = value
    findings.raise_any()
    return values


def write_settings(path: Path, config: TrainConfig) -> None:
    """Write all settings, grouped; a crash leaves an older file whole, and ``--config`` reads it back.

    Raises: UserError if the file cannot be written.
    """
    import yaml

    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, default_flow_style=False)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _load(path: Path) -> dict[str, Any]:
    text = read_text(path, LARGEST_SETTINGS_BYTES, f"--config {path} cannot be read")
    try:
        loaded, _ = parse_yaml(text, str(path))
    except UserError as reason:
        raise UserError(reason.what, found=reason.found, expected="lines of the form name: value") from reason
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path} holds no settings", found=type(loaded).__name__, expected="lines of the form name: value"
        )
    return loaded


def _flat(loaded: Mapping[Any, Any], groups: Mapping[str, type]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in loaded.items():
        if key in groups and isinstance(value, dict):
            pairs += [(f"{key}.{name}", item) for name, item in value.items()]
        elif key in groups and value is None:
            continue
        else:
            pairs.append((str(key), value))
    return pairs
