"""A jsonl file becomes binidx: each document tokenised once, in parallel, then written in shuffled order per epoch.

Memory does not grow with the size of the file, only with the number of documents (about 20 bytes for each): tokens
wait in a nameless file beside the output, which vanishes with the process.

Source of the order: RWKV-LM, ``RWKV-v5/make_data.py``.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkvpeft.atomic import writing
from rwkvpeft.data.binidx import BinidxWriter
from rwkvpeft.data.block import BadDocument, Block, prepare, tokenise_block
from rwkvpeft.data.jsonl import blocks, line_error, require_readable
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError

_LARGEST_VOCABULARY = 1 << 16
_DOCUMENTS_AT_ONCE = 1 << 14
# below this a second process takes longer to start than it saves
_WORTH_A_WORKER_BYTES = 1 << 24
_MOST_WORKERS = 32


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
    """

    path: Path
    prefix: Path
    epochs: int
    seed: int
    tokenizer: str = "world"
    text_key: str = "text"
    workers: int | None = None
    skip_bad: bool = False


class Converted(NamedTuple):
    """Documents and lines read, and the bad lines left out of them: how many, and the message for the first."""

    documents: int
    lines: int
    skipped: int
    first_skipped: str | None


class Progress(NamedTuple):
    """How far a stage is: bytes read, or documents written; ``tokens`` so far in this stage."""

    stage: str
    done: int
    total: int
    tokens: int


def convert(job: Conversion, report: Callable[[Progress], None]) -> Converted:
    """Write ``job.prefix``.bin and .idx, both complete or neither.

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
            spool = stack.enter_context(tempfile.TemporaryFile(dir=job.prefix.parent))
        sizes, summary = _fill_spool(job, spool, spool_path, report)
        if not len(sizes):
            raise UserError(
                f"{job.path} holds no document",
                found=f"{summary.lines} lines, {summary.skipped} of them bad",
                expected="JSON objects, one a line",
            )
        _write_epochs(job, spool, sizes, report)
    return summary


def _fill_spool(
    job: Conversion, spool: BinaryIO, spool_path: Path, report: Callable[[Progress], None]
) -> tuple[npt.NDArray[np.int32], Converted]:
    """Tokenise all lines into ``spool``, in order. Returns the documents' sizes, and what was read."""
    sizes, tokens, lines, skipped = array("i"), 0, 0, 0
    first_skipped: str | None = None
    total = job.path.stat().st_size
    for end, block in _tokenised_blocks(job):
        if block.bad:
            error = _bad_block(job.path, lines, block.bad)
            if not job.skip_bad:
                raise error
            first_skipped = first_skipped or error.what
        with writing(spool_path):
            spool.write(block.tokens.astype("<u2", copy=False).data)
        sizes.frombytes(block.sizes.tobytes())
        tokens += len(block.tokens)
        lines += block.lines
        skipped += len(block.bad)
        report(Progress("tokenise", end, total, tokens))
    with writing(spool_path):
        spool.flush()
    return np.frombuffer(sizes, dtype=np.int32), Converted(len(sizes), lines, skipped, first_skipped)


def _bad_block(path: Path, lines_before: int, bad: list[BadDocument]) -> UserError:
    first = bad[0]
    more = f" (it and {len(bad) - 1} more near it)" if len(bad) > 1 else ""
    error = line_error(path, lines_before + first.line, first.what, first.shown)
    return UserError(error.what, found=first.shown, fix=f"mend the line{more}, or pass --skip_bad_lines")


def _write_epochs(
    job: Conversion, spool: BinaryIO, sizes: npt.NDArray[np.int32], report: Callable[[Progress], None]
) -> None:
    sources = np.cumsum(sizes, dtype=np.int64) - sizes
    # an array is shuffled as a list is, in an eighth of the memory
    order = array("I" if len(sizes) < 1 << 32 else "Q", range(len(sizes)))
    shuffled = np.frombuffer(order, dtype=f"u{order.itemsize}")
    generator = random.Random(job.seed)
    total = job.epochs * len(sizes)
    tokens = memoryview(mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)).cast("H")
    with BinidxWriter(job.prefix) as writer:
        for _ in range(job.epochs):
            generator.shuffle(order)
            for first in range(0, len(order), _DOCUMENTS_AT_ONCE):
                chosen = shuffled[first : first + _DOCUMENTS_AT_ONCE]
                starts, lengths = sources[chosen], sizes[chosen]
                spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
                writer.add((tokens[start:end] for start, end in spans), lengths)
                report(Progress("write", writer.n_documents, total, writer.n_tokens))


def _tokenised_blocks(job: Conversion) -> Iterator[tuple[int, Block]]:
    """Where each block ends in the file, and what is in it, in the file's order."""
    workers = job.workers or _suitable_workers(job.path)
    ranges = blocks(job.path)
    if workers == 1:
        for start, end in ranges:
            yield end, tokenise_block(job.path, start, end, job.tokenizer, job.text_key)
        return
    pool = ProcessPoolExecutor(workers, _start_method(job.tokenizer), initializer=_prepare_worker)
    waiting: deque[tuple[int, Future[Block]]] = deque()
    try:
        for start, end in ranges:
            waiting.append((end, pool.submit(tokenise_block, job.path, start, end, job.tokenizer, job.text_key)))
            if len(waiting) > 2 * workers:
                place, future = waiting.popleft()
                yield place, future.result()
        for place, future in waiting:
            yield place, future.result()
    except BrokenProcessPool as reason:
        raise UserError(
            "a process that tokenises ended without a word",
            found="most often the memory is used up",
            fix=f"--workers {max(workers // 2, 1)}",
        ) from reason
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _suitable_workers(path: Path) -> int:
    if path.stat().st_size < _WORTH_A_WORKER_BYTES:
        return 1
    # where the system tells, the processors this process may use; a container has fewer than the machine
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, _MOST_WORKERS)


def _start_method(tokenizer: str) -> BaseContext:
    # forks share one tokenizer, of 240 MB for World; a program with other threads cannot fork safely
    if sys.platform == "linux" and threading.active_count() == 1:
        prepare(tokenizer)
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("spawn")


def _prepare_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Leave when the parent is killed; otherwise this process would wait for work for ever."""
    parent.join()
    os._exit(1)
