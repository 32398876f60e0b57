"""Records of a jsonl file become documents: text, and which parts of it are the assistant's words.

Two layouts hold turns. The chat layout is that of the RWKV World models, ``System: ...``, ``User: ...`` and
``Assistant: ...`` separated by blank lines; the instruction layout is ``Instruction: ...``, ``Input: ...`` and
``Response: ...``. A blank line separates turns, so inside a rendered turn newlines are reduced to single ones. The
trained part of a turn starts right after its colon, with the space: a prompt that ends in ``Assistant:`` continues
there. The blank line that ends an assistant's turn is trained too, for the model has to learn where to stop.

Source of the layouts: RWKV-LM, ``RWKV-v7/RWKV7-G1x-templates.txt``; RWKV documentation on training data.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

SEPARATOR = "\n\n"

ROLES: dict[str, str] = {
    "system": "System",
    "user": "User",
    "human": "User",
    "assistant": "Assistant",
    "gpt": "Assistant",
}

LAYOUTS = (
    '{"text": "..."}',
    '{"messages": [{"role": "user|assistant|system", "content": "..."}]}',
    '{"conversations": [{"from": "human|gpt|system", "value": "..."}]}',
    '{"instruction": "...", "input": "...", "output": "..."}',
)

_CHAT = ("System", "User", "Assistant")
_INSTRUCTION = ("Instruction", "Response")
_ANSWERS = ("Assistant", "Response")
# what stands before a header is looked at afterwards: a pattern that begins with letters is found far quicker
_HEADER = "({}):".format("|".join(_CHAT + _INSTRUCTION))
_TEXT_HEADER, _BYTES_HEADER = re.compile(_HEADER), re.compile(_HEADER.encode())
_BLANK_LINES = ("\n\n", "\n\r\n")


class Segment(NamedTuple):
    """A piece of a document. ``trained`` is true for an assistant's words, with the separator that ends its turn."""

    text: str
    trained: bool


class RecordError(ValueError):
    """A record that is not a document; the message is one line, without the file and the line number."""


def document_text(record: Mapping[str, Any], text_key: str = "text") -> str:
    """The whole document of a record, as it is tokenised. Raises RecordError as ``segments`` does."""
    if text_key in record:
        return _string(record[text_key], f'field "{text_key}"')
    return "".join(segment.text for segment in segments(record, text_key))


def segments(record: Mapping[str, Any], text_key: str = "text") -> list[Segment]:
    """Split the document of a record into what is trained under ``--loss_mask qa`` and what is not.

    Args:
        record: one JSON object in one of ``LAYOUTS``. Where it has the field ``text_key``, that text is the document
            as it is, and its turns are found in the text.
        text_key: the field that holds a whole document.
    Returns: pieces which, joined, are the document; without the token that ends it.
    Raises:
        RecordError: no known layout, a missing or empty part, an unknown role, a value that is not text.
    """
    if text_key in record:
        return _split_text(_string(record[text_key], f'field "{text_key}"'))
    if "messages" in record:
        return _chat(record["messages"], "messages", "role", "content")
    if "conversations" in record:
        return _chat(record["conversations"], "conversations", "from", "value")
    if "instruction" in record and "output" in record:
        return _instruction(record)
    known = LAYOUTS if text_key == "text" else (LAYOUTS[0].replace("text", text_key, 1), *LAYOUTS[1:])
    found = ", ".join(f'"{name}"' for name in record) or "no field"
    raise RecordError(f"no document in this record; found {found}; expected one of {', '.join(known)}")


def answer_spans(document: str | bytes) -> list[tuple[int, int]]:
    """Where assistants speak in a finished document, as (start, end) offsets into it.

    A turn starts at ``Assistant:`` or ``Response:`` at the beginning of the document or after a blank line and goes
    up to the next turn of the same layout; offsets start after the colon, and include the blank line that ends the
    turn. The first header decides the layout, so that a ``Response:`` inside a chat is content.
    """
    found = [(_role(header), header) for header in _headers(document)]
    if not found:
        return []
    layout = _CHAT if found[0][0] in _CHAT else _INSTRUCTION
    turns = [(role, header.start(), header.end()) for role, header in found if role in layout]
    ends = [start for _, start, _ in turns[1:]] + [len(document)]
    return [(begin, end) for (role, _, begin), end in zip(turns, ends, strict=True) if role in _ANSWERS]


def _headers(document: str | bytes) -> Iterator[re.Match[Any]]:
    """Where turns of either layout start."""
    if isinstance(document, str):
        for match in _TEXT_HEADER.finditer(document):
            if not match.start() or document.endswith(_BLANK_LINES, 0, match.start()):
                yield match
    else:
        blank_lines = tuple(line.encode() for line in _BLANK_LINES)
        for found in _BYTES_HEADER.finditer(document):
            if not found.start() or document.endswith(blank_lines, 0, found.start()):
                yield found


def clean_turn(text: str) -> str:
    """A turn's text without outer whitespace and without blank lines, which would read as the end of the turn."""
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\n{2,}", "\n", unix).strip()


def _role(header: re.Match[Any]) -> str:
    name = header.group(1)
    return name.decode() if isinstance(name, bytes) else name


def _split_text(text: str) -> list[Segment]:
    pieces: list[Segment] = []
    position = 0
    for start, end in answer_spans(text):
        pieces += [Segment(text[position:start], False), Segment(text[start:end], True)]
        position = end
    pieces.append(Segment(text[position:], False))
    return [piece for piece in pieces if piece.text]


def _chat(turns: object, field: str, role_key: str, text_key: str) -> list[Segment]:
    if not isinstance(turns, list) or not turns:
        raise RecordError(f'field "{field}" must be a list of turns that is not empty; found {_kind(turns)}')
    rendered: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, start=1):
        place = f'turn {number} of "{field}"'
        if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
            found = ", ".join(f'"{name}"' for name in turn) if isinstance(turn, Mapping) else _kind(turn)
            raise RecordError(f'{place} must have "{role_key}" and "{text_key}"; found {found or "no field"}')
        role = turn[role_key]
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise RecordError(f'{place} has the unknown "{role_key}" {role!r}; expected one of {", ".join(ROLES)}')
        rendered.append((ROLES[role.lower()], _string(turn[text_key], f'"{text_key}" of {place}')))
    return _render(rendered)


def _instruction(record: Mapping[str, Any]) -> list[Segment]:
    turns = [("Instruction", _string(record["instruction"], 'field "instruction"'))]
    given = record.get("input")
    if given is not None and _string(given, 'field "input"').strip():
        turns.append(("Input", given))
    turns.append(("Response", _string(record["output"], 'field "output"')))
    return _render(turns)


def _render(turns: Iterable[tuple[str, str]]) -> list[Segment]:
    """Turns as text, neighbouring pieces of one kind joined."""
    pieces: list[Segment] = []
    for header, text in turns:
        clean = clean_turn(text)
        words = f" {clean}" if clean else ""
        pieces += [Segment(f"{header}:", False), Segment(words + SEPARATOR, header in _ANSWERS)]
    last = pieces.pop()
    pieces.append(Segment(last.text.removesuffix(SEPARATOR), last.trained))
    grouped = itertools.groupby(pieces, key=lambda piece: piece.trained)
    joined = [Segment("".join(piece.text for piece in group), trained) for trained, group in grouped]
    return [piece for piece in joined if piece.text]


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name} must be text; found {_kind(value)}")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), type(value).__name__)
