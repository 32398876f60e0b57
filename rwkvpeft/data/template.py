"""The text of a conversation as the RWKV World and G1 models read it, and where assistants speak in such a text.

The chat layout is ``System: ...``, ``User: ...`` and ``Assistant: ...`` separated by blank lines; the instruction
layout is ``Instruction: ...``, ``Input: ...`` and ``Response: ...``. A blank line ends a turn, so inside a turn
newlines are reduced to single ones, in code and thoughts too. What an assistant says starts right after its colon, with
the space: a prompt that ends in ``Assistant:`` continues there. The blank line that ends its turn is its own too, for
the model has to learn where to stop.

Source: RWKV-LM, ``RWKV-v7/RWKV7-G1x-templates.txt``; RWKV documentation on training data.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rwkvpeft.data.voices import PROMPT, Voice

SEPARATOR = "\n\n"
THINK, THINK_END = "<think>", "</think>"

SYSTEM, USER, ASSISTANT = "System", "User", "Assistant"
INSTRUCTION, INPUT, RESPONSE = "Instruction", "Input", "Response"

_CHAT = (SYSTEM, USER, ASSISTANT)
_INSTRUCTION = (INSTRUCTION, RESPONSE)
_ANSWERS = (ASSISTANT, RESPONSE)
# what stands before a header is looked at afterwards: a pattern that begins with letters is found far quicker
_HEADER = "({}):".format("|".join(_CHAT + _INSTRUCTION))
_TEXT_HEADER, _BYTES_HEADER = re.compile(_HEADER), re.compile(_HEADER.encode())
_BLANK_LINES = ("\n\n", "\n\r\n")


class Segment(NamedTuple):
    """A piece of a document and who says it."""

    text: str
    voice: Voice = PROMPT

    @property
    def trained(self) -> bool:
        """Whether it is trained under ``--loss_mask qa``: an assistant's words, with the separator behind them."""
        return self.voice.weight > 0


class Turn(NamedTuple):
    """One turn: a header without its colon, the text behind it as it was given, and its weight in training."""

    header: str
    text: str
    weight: float = 0.0


def clean_turn(text: str) -> str:
    """A turn's text without outer whitespace and without blank lines, which would read as the end of the turn."""
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\n{2,}", "\n", unix).strip()


def render(turns: Sequence[Turn]) -> list[Segment]:
    """Turns as text, neighbouring pieces of one voice joined. Behind the last turn stands no blank line."""
    answers = [number for number, turn in enumerate(turns) if turn.header in _ANSWERS]
    pieces: list[Segment] = []
    for number, turn in enumerate(turns):
        clean = clean_turn(turn.text)
        words = f" {clean}" if clean else ""
        end = SEPARATOR if number + 1 < len(turns) else ""
        pieces.append(Segment(f"{turn.header}:"))
        if turn.header in _ANSWERS:
            pieces += spoken(words + end, Voice(turn.weight, is_answer=True, is_last=number == answers[-1]))
        else:
            pieces.append(Segment(words + end))
    return joined(pieces)


def chat_prompt(question: str) -> str:
    """A user's turn up to where the assistant's answer begins, as ``render`` writes it."""
    return "".join(piece.text for piece in render([Turn(USER, question), Turn(ASSISTANT, "")]))


def with_thoughts(thoughts: str, answer: str) -> str:
    """An assistant's words: thoughts in their tags on lines of their own, then the answer."""
    return f"{THINK}\n{thoughts}\n{THINK_END}\n{answer}"


def function_call(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls of functions as the assistant writes them: one object, or a list of several, in a block of JSON."""
    lines = [_json(call) for call in calls]
    block = lines[0] if len(lines) == 1 else _json_list(lines)
    return f"```json\n{block}\n```"


def function_output(output: str) -> str:
    """What a function gave back, as it stands in a user's turn."""
    return f"Function output:\n{output}"


def tool_list(tools: Sequence[Mapping[str, Any]] | str) -> str:
    """The functions an assistant may call, as they stand in the system's turn; a text is taken as it is."""
    listed = tools if isinstance(tools, str) else _json_list([_json(tool) for tool in tools])
    return f"Tools:\n{listed}\nReturn only a JSON function call."


def spoken(words: str, voice: Voice) -> list[Segment]:
    """An assistant's words cut where thoughts begin and end; the tags belong to the words around the thoughts."""
    pieces: list[Segment] = []
    position = 0
    for start, end in think_spans(words):
        pieces += [Segment(words[position:start], voice), Segment(words[start:end], voice._replace(is_think=True))]
        position = end
    return [*pieces, Segment(words[position:], voice)]


def joined(pieces: Iterable[Segment]) -> list[Segment]:
    """Pieces without empty ones, neighbours of one voice as one."""
    grouped = itertools.groupby((piece for piece in pieces if piece.text), key=lambda piece: piece.voice)
    return [Segment("".join(piece.text for piece in group), voice) for voice, group in grouped]


def think_spans(text: str | bytes) -> list[tuple[int, int]]:
    """What stands between think tags, as (start, end) offsets.

    Where a block is not closed it goes on to the text's end, trailing ends of lines left out.
    """
    spans: list[tuple[int, int]] = []
    position = 0
    while (found := _find(text, THINK, position)) >= 0:
        start = found + len(THINK)
        end = _find(text, THINK_END, start)
        if end < 0:
            stop = len(text.rstrip("\r\n")) if isinstance(text, str) else len(text.rstrip(b"\r\n"))
            return [*spans, (start, stop)] if stop > start else spans
        spans.append((start, end))
        position = end + len(THINK_END)
    return spans


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


def split_text(text: str) -> list[Segment]:
    """A finished document cut where assistants speak and think."""
    pieces: list[Segment] = []
    position = 0
    spans = answer_spans(text)
    for number, (start, end) in enumerate(spans, start=1):
        pieces.append(Segment(text[position:start]))
        pieces += spoken(text[start:end], Voice(1.0, is_answer=True, is_last=number == len(spans)))
        position = end
    return joined([*pieces, Segment(text[position:])])


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


def _role(header: re.Match[Any]) -> str:
    name = header.group(1)
    return name.decode() if isinstance(name, bytes) else name


def _find(text: str | bytes, wanted: str, position: int) -> int:
    return text.find(wanted, position) if isinstance(text, str) else text.find(wanted.encode(), position)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _json_list(lines: Sequence[str]) -> str:
    return "[\n{}\n]".format(",\n".join(lines))
