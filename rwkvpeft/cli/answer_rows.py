"""Rows of a file of answers: a question's own fields with the answer beside them, or a pair of preferences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rwkvpeft.data.questions import Question, record_error
from rwkvpeft.data.template import clean_turn

PAIR_COLUMNS = ("prompt", "chosen", "reject")
"""Of a csv file, as RWKV-LM-RLHF writes and reads it."""

_REJECTED = ("rejected", "reject")


class Said(NamedTuple):
    """One answer: its text, its seed, whether it ended by itself, how many tokens were drawn, and the number among the
    answers to the same question."""

    text: str
    seed: int
    ended: bool
    tokens: int
    sample: int


class AnswerRows:
    """A row has the record's fields, and the answer with what belongs to it.

    Args:
        key: name of the answer's field.
        n: answers to a question; more than one are numbered.
    """

    columns = ()

    def __init__(self, key: str, n: int) -> None:
        self._key = key
        self._added = (key, "seed", "ended", "tokens", *(["sample"] if n > 1 else []))

    def check(self, path: Path, question: Question) -> None:
        """Raises: UserError as FILE:LINE if the record has a field that is to be added."""
        taken = [name for name in self._added if name in question.record]
        if taken:
            fix = "--answer_key with another name" if taken[0] == self._key else "give the field another name"
            what = f'its field "{taken[0]}" would be written over'
            raise record_error(path, question.line, question.record, what, fix=fix)

    def row(self, question: Question, said: Said) -> dict[str, Any]:
        """The row of an answer."""
        values = (said.text, said.seed, said.ended, said.tokens, said.sample)
        return {**question.record, **dict(zip(self._added, values, strict=False))}


class PairRows:
    """A row has the record's fields with the answer as ``rejected``, in the form that ``chosen`` has; in csv it is
    ``prompt,chosen,reject``.
    """

    columns = PAIR_COLUMNS

    def __init__(self, is_csv: bool) -> None:
        self._is_csv = is_csv
        self.same = self.empty = 0

    def check(self, path: Path, question: Question) -> None:
        """Raises: UserError as FILE:LINE if the record has no prompt with a chosen answer."""
        wrong = self._fault(question.record)
        if wrong:
            raise record_error(path, question.line, question.record, wrong)

    def row(self, question: Question, said: Said) -> dict[str, Any] | None:
        """The row of an answer; None, and counted, if it is empty or the chosen one: that is no pair."""
        chosen = question.record["chosen"]
        if not said.text.strip():
            self.empty += 1
            return None
        if clean_turn(said.text) == clean_turn(_words(chosen)):
            self.same += 1
            return None
        if self._is_csv:
            return {"prompt": question.record["prompt"], "chosen": chosen, "reject": said.text}
        kept = {name: value for name, value in question.record.items() if name not in _REJECTED}
        return {**kept, "rejected": _like(chosen, said.text)}

    def _fault(self, record: Mapping[str, Any]) -> str:
        chosen = record.get("chosen")
        for name in ("prompt", "chosen"):
            if record.get(name) is None:
                return f'no field "{name}"; --rejected needs "prompt" and "chosen"'
        if not _words(chosen).strip():
            return 'field "chosen" must be a text, or a list of messages that ends in one; it says nothing'
        if self._is_csv and not (isinstance(record["prompt"], str) and isinstance(chosen, str)):
            return "messages do not go into csv; give --output a name that ends in .jsonl"
        return ""


def _words(chosen: object) -> str:
    """What a chosen answer says; empty if it is neither a text nor a list of messages."""
    if isinstance(chosen, list) and chosen and isinstance(chosen[-1], dict):
        last = chosen[-1]
        chosen = last.get("content", last.get("value"))
    return chosen if isinstance(chosen, str) else ""


def _like(chosen: object, text: str) -> Any:
    """``text`` in place of what the chosen answer says."""
    if isinstance(chosen, list):
        last = chosen[-1]
        return [*chosen[:-1], {**last, ("content" if "content" in last else "value"): text}]
    return text
