"""Pairs of answers as a source of documents: a document holds what the answers share, then one answer after the other.

Each answer is tokenised with its prompt in front, as a document of its own, so that its tokens are those of instruction
tuning. What both begin with is kept once; the last token of it stands at the beginning of each answer, for the first
token of an answer is predicted from it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.config.data_files import format_of
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.conversation import require_end, tokenise
from rwkvpeft.data.huggingface import sft_records
from rwkvpeft.data.jsonl import SHOWN, Record, excerpt, line_error, read_records
from rwkvpeft.data.layouts import RecordError
from rwkvpeft.data.pair_layouts import Pair, read_pair
from rwkvpeft.data.records import RecordSource, empty_stream
from rwkvpeft.data.template import render
from rwkvpeft.data.tokenizer import Tokenizer, load_tokenizer
from rwkvpeft.data.voices import VoiceTable
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


class PairSource(RecordSource):
    """Records of preferred answers, tokenised when the source is made and held in memory.

    Attributes:
        parts: (len, 2, 3) int32, of chosen and rejected what ``Part`` says.
    """

    parts: NDArray[np.int32]

    def __init__(
        self,
        name: str,
        records: Iterable[Record],
        tokenizer: Tokenizer,
        *,
        unpaired: bool,
        refuse: Callable[[UserError], None] | None = None,
    ) -> None:
        """Pairs of identical answers are left out, with a note.

        Args:
            name: of the file, for messages.
            unpaired: whether single answers with a label are read too.
            refuse: is told of a record that cannot be used, which is then left out; None: it is raised.
        Raises: UserError with NAME:LINE for a record that cannot be used, if no record is left, and what ``records``
            raises.
        """
        require_end(tokenizer)
        self.name = name
        stream, table = empty_stream(tokenizer), VoiceTable()
        sizes, lines, parts, codes = array("i"), array("q"), array("i"), bytearray()
        same: list[int] = []
        for record in records:
            try:
                made = token_pair(read_pair(record.value, unpaired=unpaired), tokenizer, table)
            except (RecordError, UserError, RecursionError) as reason:
                error = record_error(name, record, reason)
                if refuse is None:
                    raise error from reason
                refuse(error)
                continue
            if made.is_identical:
                same.append(record.line)
                continue
            stream.extend(array(stream.typecode, made.tokens))
            sizes.append(len(made.tokens))
            lines.append(record.line)
            codes += made.codes.tobytes()
            for part in made.parts:
                parts.extend(part)
        if same:
            self.notes = (_identical(name, same),)
        if not sizes and refuse is None:
            raise UserError(f"{name} holds no pair that can be learned from",
                            found=f"{len(same)} with chosen and rejected alike", expected="two answers that differ")
        self._hold(stream, sizes, lines, codes, table)
        self.parts = np.frombuffer(parts, dtype=np.int32).reshape(-1, 2, 3)


def open_pair_source(config: DataConfig, path: str, *, unpaired: bool) -> PairSource:
    """One file of ``--data_file``. Raises: UserError as ``PairSource``, and for a file without records."""
    records = records_of(config, path)
    return PairSource(path, records, load_tokenizer(config.tokenizer), unpaired=unpaired)


def records_of(config: DataConfig, path: str) -> Iterator[Record]:
    """The records of a jsonl file, a table or a dataset. Raises: UserError for data of another kind."""
    kind = format_of(path, config.data_type)
    if config.sft_field:
        raise UserError(
            "--sft_field is not read with this --objective: the columns are known by their names",
            found=" ".join(config.sft_field),
            fix="name the columns prompt, chosen and rejected; for rewards prompt, and what the rewards look at",
        )
    if kind == "jsonl":
        return read_records(path)
    if kind == "sft":
        return sft_records(path, config.sft_split, [], config.text_key)
    raise UserError(
        "this --objective reads records, and these data are tokens or text",
        found=f"{path}, --data_type {kind}",
        expected=".jsonl, .csv, .parquet, or --data_type sft with a dataset",
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


def record_error(name: str, record: Record, reason: Exception) -> UserError:
    """The error for a record that cannot be used, with NAME:LINE and its beginning."""
    if isinstance(reason, RecursionError):
        # to be written as JSON takes more of the stack than to be read
        return line_error(name, record.line, "nested too deeply to be read", "")
    what = reason.what if isinstance(reason, UserError) else str(reason)
    # tables hold values that JSON does not know, as dates
    shown = json.dumps(record.value, ensure_ascii=False, default=str)[:SHOWN]
    return line_error(name, record.line, what, excerpt(shown.encode("utf-8", errors="replace")))


def _identical(name: str, lines: list[int]) -> str:
    places = ", ".join(f"{name}:{line}" for line in lines[:3])
    more = ", ..." if len(lines) > 3 else ""
    noun = "pair is" if len(lines) == 1 else "pairs are"
    return f"{len(lines):,} {noun} left out, chosen and rejected being the same: {places}{more}"
