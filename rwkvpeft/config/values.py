"""From what a user typed, on the command line or in a YAML file, to the value a field holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rwkvpeft.config.findings import nearest
from rwkvpeft.config.flags import FlagSpec
from rwkvpeft.errors import UserError

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def from_words(spec: FlagSpec, words: list[str]) -> Any:
    """Read the words given behind a flag on the command line.

    Raises: UserError that names the flag, what was found and what would have been right.
    """
    if spec.kind == "words":
        return _word_list(spec, words)
    if spec.kind == "switch" and not words:
        return True
    return _from_text(spec, words[0])


def from_yaml(spec: FlagSpec, value: Any) -> Any:
    """Read a value of a YAML file; text is read as on the command line, since YAML takes 1e-5 for text.

    Raises: UserError as ``from_words`` does.
    """
    if value is None and spec.optional:
        return None
    if isinstance(value, str):
        return from_words(spec, [value])
    if spec.kind == "words" and isinstance(value, list):
        return _word_list(spec, [str(word) for word in value])
    if spec.kind == "json" and isinstance(value, dict):
        return value
    if spec.kind == "switch" and isinstance(value, bool):
        return value
    if isinstance(value, bool | int | float):
        return _from_text(spec, str(int(value)) if isinstance(value, bool) else repr(value))
    raise _wrong(spec, value)


def parse_json(option: str, text: str, example: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object given as the value of ``option``; an error shows ``example``.

    Raises: UserError with the place of the mistake and how to quote the value in a shell.
    """
    shown = json.dumps(example or {"r": 8})
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # a whole number may have too many digits, an object too many levels
        place = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            f"{option} is not valid JSON: {place}",
            found=text,
            expected="an object with its names in double quotes",
            fix=f'{option} \'{shown}\' (single quotes keep the shell away; of a variable: {option} "$VARIABLE")',
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{option} must be a JSON object", found=text, expected=shown)
    return value


def _from_text(spec: FlagSpec, text: str) -> Any:
    _check_text(spec, text)
    if spec.optional and text.strip().lower() == "none" and "none" not in spec.choices:
        return None
    value: Any
    if spec.kind == "json":
        value = parse_json(spec.option, text, spec.default)
    elif spec.kind == "switch":
        value = _switch(spec, text)
    elif spec.kind == "whole":
        value = _whole(spec, text)
    elif spec.kind == "number":
        value = _number(spec, text)
    else:
        value = text
    if spec.choices and str(value) not in spec.choices:
        raise _not_offered(spec, text)
    return value


def _check_text(spec: FlagSpec, text: str) -> None:
    """Refuse what is no text: bytes that are not UTF-8, which could be written into no file of the run, and NUL."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{spec.option} holds what is not UTF-8", found=ascii(text), expected="text") from error
    if "\0" in text:
        raise UserError(f"{spec.option} holds a NUL", found=ascii(text), expected="text")


def _whole(spec: FlagSpec, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise _wrong(spec, text) from error


def _number(spec: FlagSpec, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise _wrong(spec, text) from error
    if not math.isfinite(value):
        raise _wrong(spec, text)
    return value


def _switch(spec: FlagSpec, text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE + _FALSE:
        raise _wrong(spec, text)
    return word in _TRUE


def _word_list(spec: FlagSpec, words: list[str]) -> list[str]:
    joined = " ".join(words).strip()
    if joined.startswith("["):
        try:
            listed = [str(word) for word in json.loads(joined)]
        except (ValueError, TypeError, RecursionError) as error:
            raise _wrong(spec, joined) from error
    else:
        listed = joined.replace(",", " ").split()
    for word in listed:
        _check_text(spec, word)
        if spec.choices and word not in spec.choices:
            raise _not_offered(spec, word)
    if "none" in listed and len(listed) > 1:
        raise UserError(f"{spec.option} takes none alone", found=listed, fix=f"{spec.option} none")
    return [] if listed == ["none"] else listed


def _wrong(spec: FlagSpec, found: Any) -> UserError:
    expected = {
        "text": "text",
        "whole": "a whole number",
        "number": "a finite number",
        "switch": "true or false",
        "json": "a mapping",
        "words": "a list of words",
    }[spec.kind]
    if spec.unit:
        expected += f" of {spec.unit}"
    return UserError(f"{spec.option} cannot take this value", found=found, expected=expected)


def _not_offered(spec: FlagSpec, text: str) -> UserError:
    near = nearest(text, spec.choices) or nearest(text.lower(), spec.choices)
    fix = f"{spec.option} {near}" if near else None
    return UserError(f"{spec.option} does not know {text!r}", found=text, expected=list(spec.choices), fix=fix)
