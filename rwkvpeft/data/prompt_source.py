"""Records that ask something, as a source of prompts: each is tokenised up to where the answer begins.

All fields of a record are kept, for what judges the answers may want to know more than the prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from rwkvpeft.data.jsonl import Record
from rwkvpeft.data.layouts import RecordError, as_text, chat_turns, instruction_turns, prefaced
from rwkvpeft.data.pair_layouts import prompt_turns
from rwkvpeft.data.pair_source import Refuse, record_error
from rwkvpeft.data.records import RecordSource, empty_stream
from rwkvpeft.data.template import ASSISTANT, RESPONSE, Turn, render
from rwkvpeft.data.tokenizer import Tokenizer
from rwkvpeft.data.voices import VoiceTable
from rwkvpeft.errors import UserError

_QUESTIONS = ("prompt", "question", "problem", "query")
_LISTS = ("messages", "conversations")

PROMPT_FIELDS = (*_QUESTIONS, *_LISTS, "instruction")
"""Where a prompt is looked for, in this order, before the field that holds a text."""

PROMPT_TEXT = "prompt_text"
"""The field in which the text that the model reads is added to a record."""


class Asked(NamedTuple):
    """What the model reads, up to where its answer begins, and the answer that the record gives, if it gives one."""

    text: str
    answer: str | None = None


def read_prompt(record: Mapping[str, Any], text_key: str = "text") -> Asked:
    """The prompt of a record.

    Args:
        text_key: the field with a text to go on with as it is; so is a prompt beside which ``"raw": true`` stands.
    Raises: RecordError for a record without a prompt, or an empty one.
    """
    record = {name: value for name, value in record.items() if value is not None}
    name = next((name for name in (*PROMPT_FIELDS, text_key) if name in record), None)
    if name is None:
        found = ", ".join(f'"{field}"' for field in record) or "no field"
        fields = ", ".join(f'"{field}"' for field in (*PROMPT_FIELDS, text_key))
        raise RecordError(f"no prompt in this record; found {found}; expected one of {fields}")
    if name == text_key or record.get("raw"):
        text = as_text(record[name], f'field "{name}"')
        if not text:
            raise RecordError(f'field "{name}" is an empty prompt')
        return Asked(text)
    if name == "instruction":
        return Asked(_written(record, instruction_turns(record), RESPONSE))
    if name in _LISTS:
        return _conversation(record, name)
    turns = prompt_turns(record[name], name)
    if not any(turn.text.strip() for turn in turns):
        raise RecordError(f'field "{name}" is an empty prompt')
    return Asked(_written(record, turns, ASSISTANT))


def _conversation(record: Mapping[str, Any], name: str) -> Asked:
    """A conversation up to the answer to its last question, which is kept as the right one."""
    turns = chat_turns(record[name], name)
    end = len(turns)
    while end and turns[end - 1].header == ASSISTANT:
        end -= 1
    if not end:
        raise RecordError(f'field "{name}" asks nothing: no turn but the assistant\'s')
    answer = turns[-1].text.strip() if end < len(turns) else None
    return Asked(_written(record, turns[:end], ASSISTANT), answer)


def _written(record: Mapping[str, Any], turns: list[Turn], header: str) -> str:
    return "".join(piece.text for piece in render([*prefaced(record, turns), Turn(header, "")]))


class PromptSource(RecordSource):
    """Prompts and their records, held in memory; a document is a prompt, without a token that would end it.

    Attributes:
        records: with the fields ``prompt_text``, and ``answer`` where a conversation gives one.
    """

    def __init__(
        self,
        name: str,
        records: Iterable[Record],
        tokenizer: Tokenizer,
        text_key: str = "text",
        *,
        refuse: Refuse | None = None,
    ) -> None:
        """Args: ``name`` of the file; ``refuse``: is told of a record that cannot be used, which is then left out;
        None: it is raised. Raises: UserError with NAME:LINE for a record without a prompt."""
        self.name = name
        self.records: list[Mapping[str, Any]] = []
        stream, sizes, lines = empty_stream(tokenizer), array("i"), array("q")
        for record in records:
            try:
                asked = read_prompt(record.value, text_key)
                tokens = tokenizer.encode(asked.text)
            except (RecordError, UserError, RecursionError) as reason:
                error = record_error(name, record, reason)
                if refuse is None:
                    raise error from reason
                refuse(error)
                continue
            stream.extend(array(stream.typecode, tokens))
            sizes.append(len(tokens))
            lines.append(record.line)
            self.records.append(_kept(record.value, asked))
        self._hold(stream, sizes, lines, bytearray(np.zeros(len(stream), dtype=np.uint8)), VoiceTable())


def _kept(record: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    answer = {} if asked.answer is None else {"answer": asked.answer}
    return {**answer, **record, PROMPT_TEXT: asked.text}
