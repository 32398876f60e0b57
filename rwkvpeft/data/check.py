"""``--check``: what a data set holds and what is wrong with it, read as the settings say and told before a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rwkvpeft.config.data_files import data_files, format_of
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.block import Block
from rwkvpeft.data.dataset import open_source
from rwkvpeft.data.parallel import tokenised_blocks
from rwkvpeft.data.progress import Progress
from rwkvpeft.data.records import weight_error
from rwkvpeft.data.rules import MaskRule, mask_rule
from rwkvpeft.data.source import Tokens, TokenSource
from rwkvpeft.data.template import THINK, THINK_END
from rwkvpeft.data.text import data_tokenizer
from rwkvpeft.data.tokenizer import Tokenizer
from rwkvpeft.data.voices import Spoken, Voice

SHOWN_LINES = 20
_EXAMPLES = 3
_SPELLED_AT_ONCE = 1 << 20


@dataclass
class DataCheck:
    """Counts of all documents of a data set, and what is wrong with it.

    Attributes:
        ctx_len: tokens a row may have, so that a longer document is cut; None where rows go on in the next.
        sizes: tokens of each document, the final 0 included.
        trained: targets within rows that are trained.
        untrained: documents without any.
        cut: documents longer than a row, whose end is not learnt.
        cut_answers: those of them that lose something that would be trained.
        open_thoughts, stray_ends: documents with a ``<think>`` that is not closed, or a ``</think>`` too many.
        duplicates: documents that stood there before, token for token.
        bad: lines that are no documents, as messages.
        examples: under the name of a count, where the first ones are.
        notes: how files are read.
        refusals: why a run would not begin with these data.
        are_prompts: the model answers the documents itself, and nothing of them is trained.
        too_long: prompts that are left out, being longer than a row.
    """

    ctx_len: int | None
    sizes: list[npt.NDArray[np.int32]] = field(default_factory=list)
    trained: int = 0
    untrained: int = 0
    cut: int = 0
    cut_answers: int = 0
    open_thoughts: int = 0
    stray_ends: int = 0
    duplicates: int = 0
    bad: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    are_prompts: bool = False
    too_long: int = 0

    @property
    def is_fine(self) -> bool:
        """Whether a run would take the data."""
        usable = len(self.lengths()) > self.too_long if self.are_prompts else self.trained > 0
        return not self.bad and not self.refusals and usable

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document."""
        return np.concatenate([np.empty(0, dtype=np.int32), *self.sizes])

    def count(self, what: str, place: str) -> None:
        """Count one more of an attribute, and remember where it is if it is among the first."""
        setattr(self, what, getattr(self, what) + 1)
        places = self.examples.setdefault(what, [])
        if len(places) < _EXAMPLES:
            places.append(place)


def check_data(config: DataConfig, report: Callable[[Progress], None] = lambda progress: None) -> DataCheck:
    """Read all of ``--data_file`` and count.

    Args:
        config: ``ctx_len`` resolved. Of jsonl all bad lines are found; other formats stop at the first.
        report: is told how far jsonl is read.
    Raises: UserError if a file cannot be read at all.
    """
    assert config.ctx_len is not None
    found = DataCheck(None if config.dataload == "get" else config.ctx_len)
    tokenizer, rule = data_tokenizer(config), mask_rule(config)
    seen: dict[bytes, str] = {}
    for path, _ in data_files(config.data_file):
        kind = format_of(path, config.data_type)
        part = replace(config, data_file=path, data_type=kind)
        if kind == "jsonl":
            for source in _blocks(part, found, report):
                _count(source, source.place, rule, tokenizer, found, seen)
        else:
            opened = open_source(part)
            opened.check(tokenizer.vocab_size)
            found.notes += opened.notes
            _count(opened, partial(_document_of, path), rule, tokenizer, found, seen)
    return found


class _BlockSource(TokenSource):
    """The documents of one block of a jsonl file."""

    def __init__(self, path: str, block: Block, lines_before: int) -> None:
        self.name = path
        self.stream = block.tokens
        self.sizes = block.sizes
        self.starts = np.cumsum(block.sizes, dtype=np.int64) - block.sizes
        self._block, self._lines_before = block, lines_before

    def spoken(self, index: int) -> Spoken:
        """See ``TokenSource``."""
        start = int(self.starts[index])
        return Spoken(self._block.codes[start : start + int(self.sizes[index])], self._block.voices)

    def place(self, index: int) -> str:
        """FILE:LINE of a document."""
        return f"{self.name}:{self._lines_before + int(self._block.places[index])}"


def _blocks(config: DataConfig, found: DataCheck, report: Callable[[Progress], None]) -> Iterator[_BlockSource]:
    path, lines, tokens = Path(config.data_file), 0, 0
    voices: set[Voice] = set()
    blocks = tokenised_blocks(path, config.tokenizer, config.text_key, with_voices=True)
    for end, block in blocks:
        voices.update(block.voices)
        found.bad += [f"{path}:{lines + bad.line}: {bad.what}; found: {bad.shown}" for bad in block.bad]
        yield _BlockSource(str(path), block, lines)
        lines += block.lines
        tokens += len(block.tokens)
        report(Progress("check", end, path.stat().st_size, tokens))
    error = weight_error(str(path), voices, config)
    if error is not None:
        found.refusals.append(f"{error.what}; found {error.found}; {error.fix}")


def _count(
    source: TokenSource,
    place: Callable[[int], str],
    rule: MaskRule,
    tokenizer: Tokenizer,
    found: DataCheck,
    seen: dict[bytes, str],
) -> None:
    found.sizes.append(np.asarray(source.sizes, dtype=np.int32))
    for first, end in _ranges(source):
        documents = [source.read(index) for index in range(first, end)]
        count_thoughts(documents, first, place, tokenizer, found)
        for index, tokens in enumerate(documents, start=first):
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=12).digest()
            earlier = seen.setdefault(digest, place(index))
            if earlier != place(index):
                found.count("duplicates", f"{place(index)} = {earlier}")
            trained = rule.weights(source, index, len(tokens)) != 0
            longest = len(tokens) if found.ctx_len is None else found.ctx_len + 1
            n_trained = int(np.count_nonzero(trained[1:longest]))
            found.trained += n_trained
            if not n_trained:
                found.count("untrained", place(index))
            if len(tokens) > longest:
                found.count("cut", place(index))
                if trained[longest:].any():
                    found.count("cut_answers", place(index))


def _document_of(path: str, index: int) -> str:
    return f"document {index} of {path}"


def _ranges(source: TokenSource) -> Iterator[tuple[int, int]]:
    """Documents from one to another that have so many tokens together as fit into memory beside others."""
    ends = np.cumsum(source.sizes, dtype=np.int64)
    first = 0
    while first < len(source):
        before = int(ends[first - 1]) if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + _SPELLED_AT_ONCE, side="right")))
        yield first, end
        first = end


def count_thoughts(
    documents: list[Tokens], first: int, place: Callable[[int], str], tokenizer: Tokenizer, found: DataCheck
) -> None:
    """Count the documents whose thoughts do not end, or end without having begun; ``first`` is the number of the first
    of them."""
    opening, closing = tokenizer.to_bytes(THINK), tokenizer.to_bytes(THINK_END)
    together = tokenizer.spell(np.concatenate(documents))
    if opening not in together and closing not in together:
        return
    for number, tokens in enumerate(documents, start=first):
        text = tokenizer.spell(tokens)
        n_open, n_closed = text.count(opening), text.count(closing)
        if n_open > n_closed:
            found.count("open_thoughts", place(number))
        elif n_closed > n_open:
            found.count("stray_ends", place(number))
