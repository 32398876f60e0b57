"""A range of lines of a jsonl file, tokenised: the unit of work of one process."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rwkvpeft.data.conversation import RecordError, document_text, segments, tokenise
from rwkvpeft.data.jsonl import BadLine, excerpt, parse_line, read_block
from rwkvpeft.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer
from rwkvpeft.data.voices import Voice, VoiceTable
from rwkvpeft.errors import UserError

_Numbers = npt.NDArray[np.int64]


class BadDocument(NamedTuple):
    """A line that is no document: its number, counted from 1 at the block's start, why, and how it begins."""

    line: int
    what: str
    shown: str


class Block(NamedTuple):
    """What a range of lines holds.

    ``tokens`` uint16, or int32 above 65536 ids, documents end to end, each with its final 0; ``sizes`` int32, tokens of
    each, and ``places`` int32, the line each stands in, counted from 1 at the block's start; ``lines`` read, blank ones
    included; ``bad`` lines by number; ``codes`` uint8, for each token the number of
    its voice in ``voices``, nothing if that was not asked for; then ``unkept`` counts the documents with answers of a
    weight of their own.
    """

    tokens: npt.NDArray[np.integer]
    sizes: npt.NDArray[np.int32]
    lines: int
    bad: list[BadDocument]
    places: npt.NDArray[np.int32]
    codes: npt.NDArray[np.uint8]
    voices: tuple[Voice, ...]
    unkept: int


def tokenise_block(
    path: Path, start: int, end: int, tokenizer_name: str, text_key: str, with_voices: bool = False
) -> Block:
    """Tokenise the documents of bytes ``start`` to ``end`` of a file, and see that each decodes back to itself.

    Bad lines are returned, not raised. The tokenizer is loaded once per process.
    """
    tokenizer = loaded(tokenizer_name)
    lines = read_block(path, start, end)
    stream = array("H" if tokenizer.vocab_size <= 1 << 16 else "i")
    table = VoiceTable()
    ends: list[int] = []
    numbers: list[int] = []
    texts: list[bytes] = []
    spoken: list[npt.NDArray[np.uint8]] = []
    bad: list[BadDocument] = []
    unkept = 0
    for number, raw in enumerate(lines, start=1):
        try:
            record = parse_line(raw)
            if record is None:
                continue
            if with_voices:
                parts = segments(record, text_key)
                text = "".join(part.text for part in parts)
                tokens, codes = tokenise(parts, tokenizer, table)
                stream.extend(array(stream.typecode, tokens[:-1]))
                spoken.append(codes)
            else:
                # a text has no weights, and need not be taken apart
                parts = [] if text_key in record else segments(record, text_key)
                text = "".join(part.text for part in parts) or document_text(record, text_key)
                # an array of a list is made in half the time that extending by the list takes
                stream.extend(array(stream.typecode, tokenizer.encode(text)))
                unkept += any(part.voice.is_answer and part.voice.weight != 1 for part in parts)
        except (BadLine, RecordError, UserError) as reason:
            what = reason.what if isinstance(reason, UserError) else str(reason)
            bad.append(BadDocument(number, what, excerpt(raw)))
            continue
        ends.append(len(stream))
        numbers.append(number)
        texts.append(tokenizer.to_bytes(text))
    content: npt.NDArray[np.integer] = np.frombuffer(stream, dtype=np.uint16 if stream.typecode == "H" else np.int32)
    document_ends = np.array(ends, dtype=np.int64)
    lossy = _lossy_documents(tokenizer, content, document_ends, texts)
    if lossy:
        bad += [BadDocument(numbers[i], "the tokens do not decode to the text", excerpt(texts[i])) for i in lossy]
        bad.sort()
        content, document_ends = _without(lossy, content, document_ends)
        spoken = [codes for i, codes in enumerate(spoken) if i not in lossy]
        numbers = [number for i, number in enumerate(numbers) if i not in lossy]
    sizes = np.diff(document_ends, prepend=0) + 1
    tokens_with_ends = np.insert(content, document_ends, END_OF_DOCUMENT)
    all_codes = np.concatenate(spoken) if spoken else np.empty(0, dtype=np.uint8)
    places = np.array(numbers, dtype=np.int32)
    return Block(tokens_with_ends, sizes.astype(np.int32), len(lines), bad, places, all_codes, table.voices, unkept)


def prepare(tokenizer_name: str) -> None:
    """Load all that ``tokenise_block`` needs, so that processes forked from this one share it."""
    tokenizer = loaded(tokenizer_name)
    tokenizer.spell(np.array(tokenizer.encode("a"), dtype=np.uint16))


@lru_cache(maxsize=1)
def loaded(name: str) -> Tokenizer:
    """The tokenizer, loaded once in a process."""
    return load_tokenizer(name)


def _lossy_documents(
    tokenizer: Tokenizer, content: npt.NDArray[np.integer], ends: _Numbers, texts: Sequence[bytes]
) -> list[int]:
    """The documents whose tokens spell something else than their text; all are compared at once."""
    reached = np.cumsum(tokenizer.byte_lengths[content], dtype=np.int64)
    reached = np.concatenate(([0], reached))[ends]
    text_ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    if np.array_equal(reached, text_ends) and tokenizer.spell(content) == b"".join(texts):
        return []
    starts = ends - np.diff(ends, prepend=0)
    spans = zip(starts.tolist(), ends.tolist(), texts, strict=True)
    return [number for number, (start, end, text) in enumerate(spans) if tokenizer.spell(content[start:end]) != text]


def _without(
    documents: list[int], content: npt.NDArray[np.integer], ends: _Numbers
) -> tuple[npt.NDArray[np.integer], _Numbers]:
    sizes = np.diff(ends, prepend=0)
    keep = np.ones(len(ends), dtype=bool)
    keep[documents] = False
    return content[np.repeat(keep, sizes)], np.cumsum(sizes[keep])
