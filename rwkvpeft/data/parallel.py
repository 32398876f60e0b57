"""The blocks of a jsonl file, tokenised in several processes and handed out in the file's order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TypeVar

from rwkvpeft.data.block import Block, prepare, tokenise_block
from rwkvpeft.data.conversation import require_end
from rwkvpeft.data.jsonl import blocks
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError

# below this a second process takes longer to start than it saves
_WORTH_A_WORKER_BYTES = 1 << 24
_MOST_WORKERS = 32

Made = TypeVar("Made")


def tokenised_blocks(
    path: Path, tokenizer: str, text_key: str, workers: int | None = None, with_voices: bool = False
) -> Iterator[tuple[int, Block]]:
    """Where each block ends in the file, and what is in it, in the file's order.

    Args:
        tokenizer: as for ``load_tokenizer``.
        workers: processes; None: one for each processor, if the file is large enough.
        with_voices: tell who says each token too.
    Raises: UserError if the file cannot be read, the tokenizer has no token for a document's end, or a process dies.
    """
    require_end(load_tokenizer(tokenizer))
    work = partial(tokenise_block, tokenizer_name=tokenizer, text_key=text_key, with_voices=with_voices)
    yield from in_blocks(path, work, tokenizer, workers)


def in_blocks(
    path: Path, work: Callable[[Path, int, int], Made], tokenizer: str, workers: int | None = None
) -> Iterator[tuple[int, Made]]:
    """Where each block of a file of lines ends, and what ``work`` makes of it, in the file's order.

    Args:
        work: takes the file and where a block begins and ends; runs in other processes if the file is large.
        tokenizer: which ``work`` loads; ``workers``: as of ``tokenised_blocks``.
    Raises: UserError if the file cannot be read or a process dies.
    """
    ranges = blocks(path)
    workers = workers or _suitable_workers(path)
    if workers == 1:
        for start, end in ranges:
            yield end, work(path, start, end)
        return
    pool = ProcessPoolExecutor(workers, _start_method(tokenizer), initializer=_prepare_worker)
    waiting: deque[tuple[int, Future[Made]]] = deque()
    try:
        for start, end in ranges:
            waiting.append((end, pool.submit(work, path, start, end)))
            if len(waiting) > 2 * workers:
                place, future = waiting.popleft()
                yield place, future.result()
        for place, future in waiting:
            yield place, future.result()
    except BrokenProcessPool as reason:
        raise UserError(
            "a process that tokenises ended without a word",
            found="most often the memory is used up",
            fix=f"more memory, or make_data.py with --workers {max(workers // 2, 1)}",
        ) from reason
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _suitable_workers(path: Path) -> int:
    if not path.is_file() or path.stat().st_size < _WORTH_A_WORKER_BYTES:
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
