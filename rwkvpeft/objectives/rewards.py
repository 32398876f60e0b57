"""Reward functions that are ready to be named, as ``--reward rwkvpeft.objectives.rewards:exact_answer``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from rwkvpeft.errors import UserError

# thousands may be set apart by commas; a point ends a sentence unless digits follow
_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?")
_THOUGHTS = re.compile(r"\s*<think>.*?</think>\s*\S", re.DOTALL)


def exact_answer(prompts: list[str], answers: list[str], records: list[Mapping[str, Any]]) -> list[float]:
    """1 where an answer is right, otherwise 0; the right one is the record's ``answer``.

    Where that holds a number, its last number is compared with the last number of what was answered; otherwise the
    whole texts are, but for outer whitespace.
    Raises: UserError if a record has no ``answer``.
    """
    return [float(_is_right(answer, _expected(record))) for answer, record in zip(answers, records, strict=True)]


def thinks_first(prompts: list[str], answers: list[str], records: list[Mapping[str, Any]]) -> list[float]:
    """1 where an answer is ``<think>..</think>`` with something behind it, otherwise 0."""
    return [float(_THOUGHTS.match(answer) is not None) for answer in answers]


def _expected(record: Mapping[str, Any]) -> str:
    if record.get("answer") is None:
        raise UserError("exact_answer compares with the answer that the data give, and a record has none",
                        found=", ".join(map(str, record)) or "no field", expected='a field "answer"')
    return str(record["answer"])


def _is_right(answer: str, expected: str) -> bool:
    number = _last_number(expected)
    return answer.strip() == expected.strip() if number is None else _last_number(answer) == number


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
