"""Texts for a model to go on with: those of a file, and those that held-out conversations hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rwkvpeft.data.conversation import RecordError, answer_spans, document_text
from rwkvpeft.data.pair_batches import PairCollator, preferred
from rwkvpeft.data.rows import RowDataset
from rwkvpeft.data.template import SEPARATOR, chat_prompt
from rwkvpeft.data.tokenizer import Tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.reading import LARGEST_RECORD_BYTES, read_text

_LOOKED_AT = 50
_EXPECTED = 'one JSON text, {"prompt": "..."} or record of a conversation a line'


class Prompt(NamedTuple):
    """``text`` is what the model reads, ``question`` what of it is shown to people, ``expected`` the right answer, if
    it is known."""

    text: str
    question: str
    expected: str = ""


def read_prompts(path: Path | str) -> list[Prompt]:
    """The prompts of a file of JSON lines.

    A text, and what stands under ``prompt``, is asked as a user's turn. A record of the training data's layouts is
    asked up to its last answer; a ``text`` without turns is continued as it is.
    Raises: UserError naming the file and the line, also if there is no prompt.
    """
    prompts = []
    # in text, splitlines would take ten more characters for ends of lines
    lines = read_text(path, LARGEST_RECORD_BYTES, f"--sample_prompts {path} cannot be read", "utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_prompt(json.loads(line)))
            except (ValueError, RecursionError, UserError) as reason:
                raise UserError(f"{path}:{number}: this is no prompt", found=reason, expected=_EXPECTED) from reason
    if not prompts:
        raise UserError(f"--sample_prompts {path} holds no prompt", expected=_EXPECTED)
    return prompts


def held_out_prompts(dataset: RowDataset, tokenizer: Tokenizer, number: int) -> list[Prompt]:
    """The first conversations of some rows that end in an answer, each up to that answer.

    Args:
        number: at most so many; rows at the beginning are looked at only.
    """
    found: list[Prompt] = []
    for index in range(min(len(dataset), _LOOKED_AT)):
        for text, is_whole in _documents(dataset, index, tokenizer):
            prompt = _from_document(text)
            if prompt is not None and prompt.expected and len(found) < number:
                found.append(prompt if is_whole else prompt._replace(expected=f"{prompt.expected} ..."))
        if len(found) == number:
            break
    return found


def _documents(dataset: RowDataset, index: int, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Texts of the documents of a row as far as they can be told apart, and whether their ends are in the row."""
    row = dataset.row(index)
    if isinstance(dataset.collator, PairCollator):
        row = preferred(row)
    start = 0
    for length in row.lengths or (len(row.input_ids),):
        tokens = [*row.input_ids[start : start + length].tolist(), *row.labels[start + length - 1 : start + length]]
        start += length
        is_whole = tokenizer.end_token in tokens
        # behind a document's end lies padding
        yield tokenizer.decode(tokens[: tokens.index(tokenizer.end_token)] if is_whole else tokens), is_whole


def _prompt(value: Any) -> Prompt:
    if isinstance(value, dict) and set(value) == {"prompt"}:
        value = value["prompt"]
    if isinstance(value, str) and value.strip():
        return Prompt(chat_prompt(value), value.strip())
    if not isinstance(value, dict):
        raise RecordError("an empty text" if isinstance(value, str) else f"{type(value).__name__}")
    document = document_text(value).rstrip()
    prompt = _from_document(document)
    if prompt is not None:
        return prompt
    if "text" in value:
        return Prompt(document, document)
    return Prompt(f"{document}{SEPARATOR}Assistant:", _question(document))


def _from_document(document: str) -> Prompt | None:
    """A document up to its last answer; None if it does not end in one."""
    spans = answer_spans(document)
    if not spans or spans[-1][1] != len(document):
        return None
    start, end = spans[-1]
    before = document[:start].rpartition(SEPARATOR)[0]
    return Prompt(document[:start], _question(before), document[start:end].strip())


def _question(document: str) -> str:
    """The last turn without its header."""
    last = document.rpartition(SEPARATOR)[2]
    return (last.partition(":")[2] or last).strip()
