"""The examples of docs/data.md come out as the page says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from rwkvpeft.data.conversation import segments, tokenise
from rwkvpeft.data.jsonl import parse_line
from rwkvpeft.data.template import Segment
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.data.voices import Spoken, VoiceTable

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```json\n(.*?)\n```\n\n```text\n(.*?⏹⟧?)\n```\n", PAGE, re.DOTALL | re.MULTILINE)


def shown(parts: list[Segment]) -> str:
    tokenizer, table = load_tokenizer("bytes"), VoiceTable()
    tokens, codes = tokenise(parts, tokenizer, table)
    weights = Spoken(codes, table.voices).answers()
    pieces = []
    for trained, group in itertools.groupby(zip(tokens, weights, strict=True), key=lambda pair: pair[1] > 0):
        text = b"".join(tokenizer.token_bytes(token) or "⏹".encode() for token, _ in group).decode()
        pieces.append(f"⟦{text}⟧" if trained else text)
    return "".join(pieces)


def test_there_is_an_example_of_every_layout() -> None:
    assert len(EXAMPLES) == PAGE.count("```json\n{\"") - 1 == 8


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_comes_out_as_the_page_says(number: int) -> None:
    record, expected = EXAMPLES[number]
    value = parse_line(record.encode())
    assert value is not None
    assert shown(segments(value)) == expected
