"""Rows of a file of answers: a question's own fields with the answer beside them, or a pair of preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rwkvpeft.data.layouts import RecordError
from rwkvpeft.data.pair_layouts import CHOSEN, REJECTED, read_pair
from rwkvpeft.data.prompt_source import read_prompt
from rwkvpeft.data.template import Turn, clean_turn, render

PAIR_COLUMNS = ("prompt", CHOSEN, "reject")
"""Of a csv file, as RWKV-LM-RLHF writes and reads it."""

_ANYTHING = "-"


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

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises: RecordError if the record has a field that is to be added."""
        taken = next((name for name in self._added if name in record), None)
        if taken is not None:
            fix = "give --answer_key another name" if taken == self._key else "give the field another name"
            raise RecordError(f'its field "{taken}" would be written over; {fix}')

    def row(self, record: Mapping[str, Any], said: Said) -> dict[str, Any]:
        """The row of an answer."""
        values = (said.text, said.seed, said.ended, said.tokens, said.sample)
        return {**record, **dict(zip(self._added, values, strict=False))}


class PairRows:
    """A row has the record's fields with the answer as ``rejected``, in the form that ``chosen`` has; in csv it is
    ``prompt,chosen,reject``.

    Attributes:
        same, empty: answers that make no pair, for they are the chosen one or say nothing.
    """

    columns = PAIR_COLUMNS

    def __init__(self, is_csv: bool) -> None:
        self._is_csv = is_csv
        self.same = self.empty = 0

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises: RecordError if the record lacks a chosen answer, is none that training with pairs reads, or is
        trained with another prompt than the one that is asked."""
        if record.get(CHOSEN) is None:
            raise RecordError(f'no field "{CHOSEN}", which --rejected needs beside a prompt')
        asked = read_prompt(record).text
        if _before_answer(_pair(record, _ANYTHING)) != asked:
            raise RecordError(f'its prompt and what stands before the last turn of "{CHOSEN}" are not the same text, '
                              "so that the model would answer something else than pairs are trained with")
        if not self._is_csv:
            return
        texts = {name: record.get(name) for name in ("prompt", CHOSEN)}
        if not all(isinstance(text, str) for text in texts.values()):
            raise RecordError('csv holds a text "prompt" and a text "chosen"; give --output a name that ends in .jsonl')
        if _before_answer(_pair(texts, _ANYTHING)) != asked:
            raise RecordError('csv holds "prompt" and "chosen" alone, and the prompt here has more; give --output '
                              "a name that ends in .jsonl")

    def row(self, record: Mapping[str, Any], said: Said) -> dict[str, Any] | None:
        """The row of an answer; None, and counted, if there is no pair."""
        chosen = read_pair(_pair(record, _ANYTHING), unpaired=False).chosen
        assert chosen is not None
        if not said.text.strip():
            self.empty += 1
            return None
        if clean_turn(said.text) == clean_turn(chosen[-1].text):
            self.same += 1
            return None
        if self._is_csv:
            return {"prompt": record["prompt"], CHOSEN: record[CHOSEN], "reject": said.text}
        return _pair(record, said.text)


def _before_answer(pair: Mapping[str, Any]) -> str:
    """What is trained in front of a pair's last turn, with that turn's header."""
    found = read_pair(pair, unpaired=False)
    assert found.chosen is not None
    turns = [*found.prompt, *found.chosen]
    return "".join(piece.text for piece in render([*turns[:-1], Turn(turns[-1].header, "")]))


def _pair(record: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The record with ``text`` as the rejected answer."""
    kept = {name: value for name, value in record.items() if name not in REJECTED}
    return {**kept, REJECTED[0]: _like(record[CHOSEN], text)}


def _like(chosen: object, text: str) -> Any:
    """``text`` in place of what the chosen answer says last."""
    if isinstance(chosen, Mapping):
        return {**chosen, ("value" if "value" in chosen else "content"): text}
    if isinstance(chosen, (list, tuple)) and chosen:
        return [*chosen[:-1], _like(chosen[-1], text)]
    return text
