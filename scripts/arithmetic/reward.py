"""Judges answers to the problems of ``problems.py``; named as ``--reward scripts/arithmetic/reward.py:right``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def right(prompts: list[str], answers: list[str], records: list[Mapping[str, Any]]) -> list[float]:
    """1 for the right number and nothing else, otherwise 0."""
    return [float(answer.strip() == record["answer"]) for answer, record in zip(answers, records, strict=True)]


def brief(prompts: list[str], answers: list[str], records: list[Mapping[str, Any]]) -> list[float]:
    """1 for an answer of at most three characters, otherwise 0: sums are no longer."""
    return [float(len(answer.strip()) <= 3) for answer in answers]
