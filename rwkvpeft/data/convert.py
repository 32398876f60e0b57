"""A jsonl file becomes binidx: each document tokenised once, in parallel, then written in shuffled order per epoch.

Memory does not grow with the size of the file, only with the number of documents (about 20 bytes for each): tokens
wait in a nameless file beside the output, which vanishes with the process.

Source of the order: RWKV-LM, ``RWKV-v5/make_data.py``.
"""

from __future__ import annotations

import mmap
import random
import tempfile
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkvpeft.atomic import writing
from rwkvpeft.data.binidx import BinidxWriter
from rwkvpeft.data.block import BadDocument
from rwkvpeft.data.jsonl import line_error, require_readable
from rwkvpeft.data.parallel import tokenised_blocks
from rwkvpeft.data.progress import Progress
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.data.voices import VoiceTable
from rwkvpeft.errors import UserError

_LARGEST_VOCABULARY = 1 << 16
_DOCUMENTS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Conversion:
    """What to convert and how.

    Attributes:
        path: the jsonl file; ``prefix``: the output without ``.bin`` and ``.idx``.
        epochs: how many shuffled copies to write.
        seed: of the order.
        tokenizer: as for ``load_tokenizer``; at most 65536 ids.
        text_key: the field that holds a whole document.
        workers: processes that tokenise; None: one for each processor, if the file is large enough.
        skip_bad: leave bad lines out instead of refusing the file.
        with_mask: write who says each token beside the pair, as ``.mask``.
        origin: the file that ``path`` was made of line by line, which messages name instead.
    """

    path: Path
    prefix: Path
    epochs: int
    seed: int
    tokenizer: str = "world"
    text_key: str = "text"
    workers: int | None = None
    skip_bad: bool = False
    with_mask: bool = False
    origin: Path | None = None

    @property
    def name(self) -> Path:
        """The file that messages name."""
        return self.origin or self.path


class Converted(NamedTuple):
    """Documents and lines read, and the bad lines left out of them: how many, and the message for the first.

    ``unkept``: documents whose turns have weights that no mask keeps.
    """

    documents: int
    lines: int
    skipped: int
    first_skipped: str | None
    unkept: int


def convert(job: Conversion, report: Callable[[Progress], None]) -> Converted:
    """Write ``job.prefix``.bin and .idx, and .mask if it is asked for: all complete or none.

    Equal, byte for byte, to upstream's output after ``random.seed(seed)``.
    Raises: UserError with FILE:LINE for a line that is no document, and for files that cannot be read or written.
    """
    require_readable(job.path)
    if load_tokenizer(job.tokenizer).vocab_size > _LARGEST_VOCABULARY:
        raise UserError(f"--tokenizer {job.tokenizer} has ids that 16 bits cannot hold", expected="ids up to 65535")
    spool_path = job.prefix.with_name(job.prefix.name + ".bin")
    with ExitStack() as stack:
        with writing(spool_path):
            job.prefix.parent.mkdir(parents=True, exist_ok=True)
            spool, codes = (stack.enter_context(tempfile.TemporaryFile(dir=job.prefix.parent)) for _ in range(2))
        table = VoiceTable()
        sizes, summary = _fill_spool(job, _Spool(spool, codes, table, spool_path), report)
        if not len(sizes):
            raise UserError(
                f"{job.name} holds no document",
                found=f"{summary.lines} lines, {summary.skipped} of them bad",
                expected="JSON objects, one a line",
            )
        _write_epochs(job, spool, codes if job.with_mask else None, sizes, table, report)
    return summary


class _Spool(NamedTuple):
    """Where tokens and the codes of their voices wait, and what an error names in their place."""

    tokens: BinaryIO
    codes: BinaryIO
    table: VoiceTable
    path: Path


def _fill_spool(
    job: Conversion, spool: _Spool, report: Callable[[Progress], None]
) -> tuple[npt.NDArray[np.int32], Converted]:
    """Tokenise all lines into ``spool``, in order. Returns the documents' sizes, and what was read."""
    sizes, tokens, lines, skipped, unkept = array("i"), 0, 0, 0, 0
    first_skipped: str | None = None
    total = job.path.stat().st_size
    for end, block in tokenised_blocks(job.path, job.tokenizer, job.text_key, job.workers, job.with_mask):
        if block.bad:
            error = _bad_block(job.name, lines, block.bad)
            if not job.skip_bad:
                raise error
            first_skipped = first_skipped or error.what
        with writing(spool.path):
            spool.tokens.write(block.tokens.astype("<u2", copy=False).data)
            if job.with_mask:
                spool.codes.write(spool.table.translation(block.voices)[block.codes].data)
        sizes.frombytes(block.sizes.tobytes())
        tokens += len(block.tokens)
        lines += block.lines
        skipped += len(block.bad)
        unkept += block.unkept
        report(Progress("tokenise", end, total, tokens))
    with writing(spool.path):
        spool.tokens.flush()
        spool.codes.flush()
    return np.frombuffer(sizes, dtype=np.int32), Converted(len(sizes), lines, skipped, first_skipped, unkept)


def _bad_block(path: Path, lines_before: int, bad: list[BadDocument]) -> UserError:
    first = bad[0]
    more = f" (it and {len(bad) - 1} more near it)" if len(bad) > 1 else ""
    error = line_error(path, lines_before + first.line, first.what, first.shown)
    return UserError(error.what, found=first.shown, fix=f"mend the line{more}, or pass --skip_bad_lines")


def _write_epochs(
    job: Conversion,
    spool: BinaryIO,
    spool_of_codes: BinaryIO | None,
    sizes: npt.NDArray[np.int32],
    table: VoiceTable,
    report: Callable[[Progress], None],
) -> None:
    sources = np.cumsum(sizes, dtype=np.int64) - sizes
    # an array is shuffled as a list is, in an eighth of the memory
    order = array("I" if len(sizes) < 1 << 32 else "Q", range(len(sizes)))
    shuffled = np.frombuffer(order, dtype=f"u{order.itemsize}")
    generator = random.Random(job.seed)
    total = job.epochs * len(sizes)
    tokens = _mapped(spool).cast("H")
    codes = _mapped(spool_of_codes) if spool_of_codes else None
    with BinidxWriter(job.prefix, voices=table.voices if codes else None) as writer:
        for _ in range(job.epochs):
            generator.shuffle(order)
            for first in range(0, len(order), _DOCUMENTS_AT_ONCE):
                chosen = shuffled[first : first + _DOCUMENTS_AT_ONCE]
                starts, lengths = sources[chosen], sizes[chosen]
                spans = list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))
                spoken = (codes[start:end] for start, end in spans) if codes else ()
                writer.add((tokens[start:end] for start, end in spans), lengths, spoken)
                report(Progress("write", writer.n_documents, total, writer.n_tokens))


def _mapped(file: BinaryIO) -> memoryview:
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
