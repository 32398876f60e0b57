"""Pairs of answers as a source of documents: a document holds what the answers share, then one answer after the other.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.config.data_files import format_of
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.conversation import require_end
from rwkvpeft.data.huggingface import sft_records
from rwkvpeft.data.jsonl import Record, line_error, read_records
from rwkvpeft.data.pair_block import PairBlock, bad_record, tokenise_pair_block, tokenise_pairs
from rwkvpeft.data.parallel import in_blocks
from rwkvpeft.data.progress import Progress, ProgressLines
from rwkvpeft.data.records import RecordSource, empty_stream
from rwkvpeft.data.tokenizer import Tokenizer, load_tokenizer
from rwkvpeft.data.voices import VoiceTable
from rwkvpeft.errors import UserError

Refuse = Callable[[UserError], None]
"""Is told of a record that cannot be used, which is then left out."""

_RECORDS_AT_ONCE = 1024


class PairSource(RecordSource):
    """Records of preferred answers, held in memory. Pairs of identical answers are left out, with a note.

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
        refuse: Refuse | None = None,
    ) -> None:
        """
        Args:
            name: of the file, for messages.
            unpaired: whether single answers with a label are read too.
            refuse: None: a record that cannot be used is raised.
        Raises: UserError with NAME:LINE for a record that cannot be used, if no record is left, and what ``records``
            raises.
        """
        require_end(tokenizer)
        self.name = name
        self._take(_blocks_of(records, tokenizer, unpaired), tokenizer, refuse)

    def prompt(self, record: int) -> bytes:
        """Tells the prompt of a record from others: a hash of the tokens in front of its first answer."""
        answer = next(answer for start, answer, stop in self.parts[record].tolist() if stop > start)
        return hashlib.blake2b(self.read(record, answer).tobytes(), digest_size=16).digest()

    def kin(self) -> NDArray[np.int64]:
        """See ``TokenSource``: records with the same prompt, else a held-out prompt would be one that was trained."""
        numbers: dict[bytes, int] = {}
        return np.array([numbers.setdefault(self.prompt(record), record) for record in range(len(self))], np.int64)

    def _take(self, blocks: Iterable[PairBlock], tokenizer: Tokenizer, refuse: Refuse | None) -> None:
        stream, table, codes = empty_stream(tokenizer), VoiceTable(), bytearray()
        sizes, places, parts = array("i"), array("q"), array("i")
        same: list[int] = []
        lines = 0
        for block in blocks:
            for bad in block.bad:
                _tell(line_error(self.name, lines + bad.line, bad.what, bad.shown), refuse)
            stream.frombytes(block.tokens.astype(stream.typecode).tobytes())
            codes += table.translation(block.voices)[block.codes].tobytes()
            sizes.frombytes(block.sizes.tobytes())
            places.frombytes((block.places + lines).tobytes())
            parts.frombytes(block.parts.tobytes())
            same += [lines + line for line in block.same]
            lines += block.lines
        if same:
            self.notes = (_identical(self.name, same),)
        if not sizes and refuse is None:
            raise UserError(f"{self.name} holds no pair that can be learned from",
                            found=f"{len(same)} with chosen and rejected alike" if same else "no record",
                            expected="two answers that differ")
        self._hold(stream, sizes, places, codes, table)
        self.parts = np.frombuffer(parts, dtype=np.int32).reshape(-1, 2, 3)


class JsonlPairs(PairSource):
    """A jsonl file of preferred answers; a large one is tokenised in several processes."""

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        *,
        unpaired: bool,
        refuse: Refuse | None = None,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Args and errors as of ``PairSource``; ``report`` is told how far the file is read."""
        require_end(tokenizer)
        self.name = path
        work = partial(tokenise_pair_block, tokenizer_name=tokenizer.name, unpaired=unpaired)
        blocks = in_blocks(Path(path), work, tokenizer.name)
        self._take(_reported(blocks, Path(path), report), tokenizer, refuse)


def open_pair_source(
    config: DataConfig, path: str, *, unpaired: bool, refuse: Refuse | None = None
) -> PairSource:
    """One file of ``--data_file``.

    Args:
        unpaired, refuse: as of ``PairSource``.
    Raises: UserError as ``PairSource``, and for a file without records.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if format_of(path, config.data_type) != "jsonl":
        return PairSource(path, records_of(config, path), tokenizer, unpaired=unpaired, refuse=refuse)
    with ProgressLines(sys.stderr.isatty()) as progress:
        return JsonlPairs(path, tokenizer, unpaired=unpaired, refuse=refuse, report=progress.show_slow)


def _blocks_of(records: Iterable[Record], tokenizer: Tokenizer, unpaired: bool) -> Iterator[PairBlock]:
    """Records of any origin, tokenised in this process."""
    left = iter(records)
    while some := list(itertools.islice(left, _RECORDS_AT_ONCE)):
        yield tokenise_pairs(some, tokenizer, unpaired)


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


def record_error(name: str, record: Record, reason: Exception) -> UserError:
    """The error for a record that cannot be used, with NAME:LINE and its beginning."""
    bad = bad_record(record, reason)
    return line_error(name, bad.line, bad.what, bad.shown)


def _reported(
    blocks: Iterator[tuple[int, PairBlock]], path: Path, report: Callable[[Progress], None]
) -> Iterator[PairBlock]:
    tokens = 0
    for end, block in blocks:
        yield block
        tokens += len(block.tokens)
        report(Progress("tokenise", end, path.stat().st_size, tokens))


def _tell(error: UserError, refuse: Refuse | None) -> None:
    if refuse is None:
        raise error
    refuse(error)


def _identical(name: str, lines: list[int]) -> str:
    places = ", ".join(f"{name}:{line}" for line in lines[:3])
    more = ", ..." if len(lines) > 3 else ""
    noun = "pair is" if len(lines) == 1 else "pairs are"
    return f"{len(lines):,} {noun} left out, chosen and rejected being the same: {places}{more}"
