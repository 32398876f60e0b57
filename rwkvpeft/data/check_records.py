"""``--check`` for whatever an objective reads: documents, preferred answers or prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rwkvpeft.config.data_files import data_files, format_of
from rwkvpeft.config.groups import DataConfig, TrainConfig
from rwkvpeft.data.check import DataCheck, check_data, count_thoughts
from rwkvpeft.data.jsonl import BadLine, Record, blocks, excerpt, parse_line, read_block
from rwkvpeft.data.openings import answers_of
from rwkvpeft.data.pair_batches import WITH_MISMATCHED
from rwkvpeft.data.pair_source import open_pair_source, records_of
from rwkvpeft.data.pairs import PairRows
from rwkvpeft.data.progress import Progress
from rwkvpeft.data.prompt_source import PromptSource
from rwkvpeft.data.records import RecordSource
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError


def check_training_data(config: TrainConfig, report: Callable[[Progress], None]) -> DataCheck:
    """Read all of ``--data_file`` as the objective does and count.

    Args:
        report: is told how far documents are read.
    Raises: UserError if a file cannot be read at all.
    """
    if config.objective.reads == "tokens":
        return check_data(config.data, report)
    if config.objective.reads == "pairs":
        return check_pairs(config.data, answers_of(config))
    return check_prompts(config.data)


def check_pairs(config: DataConfig, answers: int) -> DataCheck:
    """Records of preferred answers: a document is a record, as long as its prompt with the longer answer.

    Args:
        config: ``ctx_len`` resolved.
        answers: as of ``open_pairs``.
    Raises: UserError as ``check_training_data``.
    """
    assert config.ctx_len is not None
    found = DataCheck(config.ctx_len)
    tokenizer, seen = load_tokenizer(config.tokenizer), dict[bytes, str]()
    for path, _ in data_files(config.data_file):
        source = open_pair_source(config, path, unpaired=answers == WITH_MISMATCHED,
                                  refuse=lambda error: found.bad.append(_line(error)))
        parts = source.parts
        found.sizes.append((parts[:, 0, 0] + (parts[:, :, 2] - parts[:, :, 0]).max(axis=1)).astype(np.int32))
        found.notes += source.notes
        _count_copies(source, found, seen)
        tokens = [source.read(record) for record in range(len(source))]
        if tokens:
            count_thoughts(tokens, 0, source.label, tokenizer, found)
        rows = PairRows(source, config.ctx_len, seed=0, shuffle=False, answers=answers, mask_think=config.mask_think)
        found.trained += rows.report().trained_tokens
        for record in sorted(set(range(len(source))) - set(rows.records.tolist())):
            found.count("untrained", source.label(record))
        for record in np.flatnonzero(found.sizes[-1] > config.ctx_len + 1).tolist():
            found.count("cut", source.label(record))
    return found


def check_prompts(config: DataConfig) -> DataCheck:
    """Prompts: nothing of them is trained, and one that is longer than a row is left out. Raises: as ``check_pairs``.
    """
    assert config.ctx_len is not None
    found = DataCheck(config.ctx_len, are_prompts=True)
    tokenizer, seen = load_tokenizer(config.tokenizer), dict[bytes, str]()
    for path, _ in data_files(config.data_file):
        source = PromptSource(path, _records(config, path, found), tokenizer, config.text_key,
                              refuse=lambda error: found.bad.append(_line(error)))
        found.sizes.append(source.sizes)
        _count_copies(source, found, seen)
        for record in np.flatnonzero(source.sizes > config.ctx_len).tolist():
            found.count("too_long", source.label(record))
    return found


def _records(config: DataConfig, path: str, found: DataCheck) -> Iterator[Record]:
    """The records of a file; of a jsonl file the lines that are none are noted."""
    if format_of(path, config.data_type) != "jsonl":
        yield from records_of(config, path)
        return
    line = 0
    for start, end in blocks(Path(path)):
        for raw in read_block(Path(path), start, end):
            line += 1
            try:
                value = parse_line(raw)
            except BadLine as reason:
                found.bad.append(f"{path}:{line}: {reason}; found: {excerpt(raw)}")
                continue
            if value is not None:
                yield Record(line, value)


def _line(error: UserError) -> str:
    return f"{error.what}; found: {error.found}"


def _count_copies(source: RecordSource, found: DataCheck, seen: dict[bytes, str]) -> None:
    for record in range(len(source)):
        place = source.label(record)
        digest = hashlib.blake2b(source.read(record).tobytes(), digest_size=12).digest()
        earlier = seen.setdefault(digest, place)
        if earlier != place:
            found.count("duplicates", f"{place} = {earlier}")
