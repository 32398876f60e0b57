"""Records of preferred answers, tokenised: the unit of work of one process.

Each answer is tokenised with its prompt in front, as a document of its own, so that its tokens are those of instruction
tuning. What both begin with is kept once; the last token of it stands at the beginning of each answer, for the first
token of an answer is predicted from it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.data.block import BadDocument, loaded
from rwkvpeft.data.conversation import tokenise
from rwkvpeft.data.jsonl import SHOWN, BadLine, Record, excerpt, parse_line, read_block
from rwkvpeft.data.layouts import RecordError
from rwkvpeft.data.pair_layouts import Pair, read_pair
from rwkvpeft.data.records import empty_stream
from rwkvpeft.data.template import render
from rwkvpeft.data.tokenizer import Tokenizer
from rwkvpeft.data.voices import Voice, VoiceTable
from rwkvpeft.errors import UserError


class Part(NamedTuple):
    """Where an answer lies in its document: ``start`` to ``stop``, and ``answer``, its first token that an assistant
    says; all equal for one that is not there."""

    start: int
    answer: int
    stop: int


class TokenPair(NamedTuple):
    """What a record becomes: ``tokens`` and ``codes`` (T,), the shared part first; and where its two answers lie."""

    tokens: list[int]
    codes: NDArray[np.uint8]
    parts: tuple[Part, Part]

    @property
    def is_identical(self) -> bool:
        """Whether both answers are there and the same."""
        chosen, rejected = (self.tokens[part.start : part.stop] for part in self.parts)
        return chosen == rejected


class PairBlock(NamedTuple):
    """What some records hold.

    ``tokens`` (T,) of all records end to end, and ``codes`` (T,) uint8, their voices in ``voices``; ``sizes`` (n,)
    int32, tokens of each record, ``places`` (n,) int64, the line it stands in, and ``parts`` (n, 2, 3) int32, where its
    answers lie; ``same`` lines of pairs that are left out, for their answers are the same; ``bad`` records; ``lines``
    read, blank ones included, where places are counted from the first of them, and otherwise 0.
    """

    tokens: NDArray[np.integer]
    codes: NDArray[np.uint8]
    voices: tuple[Voice, ...]
    sizes: NDArray[np.int32]
    places: NDArray[np.int64]
    parts: NDArray[np.int32]
    same: list[int]
    bad: list[BadDocument]
    lines: int = 0


def tokenise_pair_block(path: Path, start: int, end: int, tokenizer_name: str, unpaired: bool) -> PairBlock:
    """The records of bytes ``start`` to ``end`` of a jsonl file. Arguments as of ``tokenise_pairs``."""
    lines = read_block(path, start, end)
    bad: list[BadDocument] = []
    records = _parsed(lines, bad)
    made = tokenise_pairs(records, loaded(tokenizer_name), unpaired)
    return made._replace(bad=sorted([*made.bad, *bad]), lines=len(lines))


def tokenise_pairs(records: Iterable[Record], tokenizer: Tokenizer, unpaired: bool) -> PairBlock:
    """Tokenise records; bad ones are returned, not raised.

    Args:
        unpaired: whether single answers with a label are read too.
    """
    stream, table, codes = empty_stream(tokenizer), VoiceTable(), bytearray()
    sizes, places, parts = array("i"), array("q"), array("i")
    same: list[int] = []
    bad: list[BadDocument] = []
    for record in records:
        try:
            made = token_pair(read_pair(record.value, unpaired=unpaired), tokenizer, table)
        except (RecordError, UserError, RecursionError) as reason:
            bad.append(bad_record(record, reason))
            continue
        if made.is_identical:
            same.append(record.line)
            continue
        stream.extend(array(stream.typecode, made.tokens))
        codes += made.codes.tobytes()
        sizes.append(len(made.tokens))
        places.append(record.line)
        for part in made.parts:
            parts.extend(part)
    return PairBlock(
        np.array(stream), np.frombuffer(bytes(codes), dtype=np.uint8), table.voices, np.array(sizes, dtype=np.int32),
        np.array(places, dtype=np.int64), np.array(parts, dtype=np.int32).reshape(-1, 2, 3), same, bad,
    )


def token_pair(pair: Pair, tokenizer: Tokenizer, table: VoiceTable) -> TokenPair:
    """A pair as tokens. Raises: UserError as ``tokenise``."""
    each = [None if turns is None else tokenise(render([*pair.prompt, *turns]), tokenizer, table)
            for turns in pair.answers]
    there = [made for made in each if made is not None]
    spoken = np.array([voice.weight > 0 for voice in table.voices])
    # the first token of a document is predicted from nothing
    firsts = [max(1, int(spoken[codes].argmax())) for _, codes in there]
    shared = _shared(there[0][0], there[-1][0], min(firsts))
    tokens = there[0][0][:shared]
    codes = [there[0][1][:shared]]
    parts: list[Part] = []
    for made in each:
        start = len(tokens)
        if made is None:
            parts.append(Part(start, start, start))
            continue
        tokens = tokens + made[0][shared:]
        codes.append(made[1][shared:])
        parts.append(Part(start, start + firsts.pop(0) - shared, len(tokens)))
    return TokenPair(tokens, np.concatenate(codes), (parts[0], parts[1]))


def _shared(one: list[int], other: list[int], most: int) -> int:
    """Tokens that both begin with and that are not scored, less the last of them."""
    pairs = zip(one[:most], other[:most], strict=False)
    common = next((place for place, (a, b) in enumerate(pairs) if a != b), min(most, len(one), len(other)))
    return max(0, common - 1)


def bad_record(record: Record, reason: Exception) -> BadDocument:
    """Why a record cannot be used, and its beginning."""
    if isinstance(reason, RecursionError):
        # to be written as JSON takes more of the stack than to be read
        return BadDocument(record.line, "nested too deeply to be read", "")
    what = reason.what if isinstance(reason, UserError) else str(reason)
    # tables hold values that JSON does not know, as dates
    shown = json.dumps(record.value, ensure_ascii=False, default=str)[:SHOWN]
    return BadDocument(record.line, what, excerpt(shown.encode("utf-8", errors="replace")))


def _parsed(lines: Iterable[bytes], bad: list[BadDocument]) -> Iterator[Record]:
    """The records of lines, which are counted from 1; those that are none are added to ``bad``."""
    for number, raw in enumerate(lines, start=1):
        try:
            value = parse_line(raw)
        except BadLine as reason:
            bad.append(BadDocument(number, str(reason), excerpt(raw)))
            continue
        if value is not None:
            yield Record(number, value)
