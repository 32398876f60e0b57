"""A teacher reads data, document by document from its beginning, and what it says is stored.

Letters: N places of a shard, K tokens that are told apart, T tokens read at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.data.label_index import (
    INDEX,
    LabelIndex,
    fingerprint_of,
    places_of,
    read_index,
    sizes_of,
    write_index,
)
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.tensor_file import empty_arrays, to_bf16, write_arrays
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.state import RecurrentState
from rwkvpeft.objectives.teaching import read_in_chunks, words_of
from rwkvpeft.ops.divergence import Likeliest
from rwkvpeft.ops.sequences import Sequences

_LARGEST_SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class LabelSettings:
    """How labels are to be made; see ``LabelIndex``, whose shards may be smaller. ``tokens_at_once`` T; ``chunk_rows``
    rows of logits at once."""

    top_k: int
    dtype: str
    temperatures: tuple[float, ...]
    ctx_len: int
    shard_places: int
    tokens_at_once: int
    chunk_rows: int


class _Span(NamedTuple):
    """Places ``start`` to ``stop`` - 1 of a document, counted in it, that are wanted."""

    document: int
    start: int
    stop: int


class _Carried(NamedTuple):
    """What a document's first ``read`` tokens left behind."""

    document: int
    read: int
    state: RecurrentState


def index_of(
    teacher: str, fingerprint: str, vocab_size: int, sources: Sequence[TokenSource], settings: LabelSettings
) -> LabelIndex:
    """What the folder will say of itself. Reads all tokens of the data."""
    sizes = sizes_of(sources)
    index = LabelIndex(
        teacher=teacher,
        teacher_fingerprint=fingerprint,
        vocab_size=vocab_size,
        top_k=min(settings.top_k, vocab_size) or vocab_size,
        dtype=settings.dtype,
        temperatures=settings.temperatures,
        ctx_len=settings.ctx_len,
        documents=len(sizes),
        tokens=int(sizes.sum(dtype=np.int64)),
        data_fingerprint=fingerprint_of(sources),
        places=int(places_of(sizes, settings.ctx_len)[-1]),
        shard_places=settings.shard_places,
    )
    # all tokens of a large vocabulary take hundreds of KB a place
    return replace(index, shard_places=max(1, min(index.shard_places, _LARGEST_SHARD_BYTES // index.bytes_per_place)))


def begin(folder: Path, index: LabelIndex, sources: Sequence[TokenSource]) -> list[int]:
    """Write the folder's index, or compare with the one that is there. Returns: the shards that are still to be made.

    Raises: UserError if the folder holds labels that were made in another way, or of other data.
    """
    if (folder / INDEX).is_file():
        # a file that was moved or renamed is the same teacher
        found = replace(read_index(folder), teacher=index.teacher)
        if found != index:
            others = [name for name, value in vars(index).items() if getattr(found, name) != value]
            raise UserError(
                f"{folder} holds labels that were made in another way",
                found=[f"{name} {getattr(found, name)}" for name in others],
                expected=[f"{name} {getattr(index, name)}" for name in others],
                fix="another --output, or the settings that are there",
            )
    else:
        write_index(folder, index, sizes_of(sources))
    return [shard for shard in range(index.shards) if not index.has_shard(folder, shard)]


def write_labels(
    model: Rwkv,
    sources: Sequence[TokenSource],
    folder: Path,
    index: LabelIndex,
    settings: LabelSettings,
    shards: Sequence[int],
    tell: Callable[[int], object],
) -> None:
    """Let the teacher read what the given shards are about, in ascending order, and write each of them.

    Whole documents are read side by side in packed rows; one that does not fit into T tokens, or that a shard's border
    cuts, is read alone, T tokens at a time, and its state is kept for the next shard. So the memory is that of a shard
    and of T tokens.

    Args:
        tell: is told the places that were labelled since the last call.
    """
    labeller = _Labeller(model, sources, index, settings, tell)
    for shard in shards:
        start, stop = index.shard_range(shard)
        arrays = labeller.arrays(start, stop)
        write_arrays(index.shard_path(folder, shard), index.layouts(stop - start), arrays)


class _Labeller:
    """A teacher at work, shard by shard."""

    def __init__(
        self,
        model: Rwkv,
        sources: Sequence[TokenSource],
        index: LabelIndex,
        settings: LabelSettings,
        tell: Callable[[int], object],
    ) -> None:
        self._model = model
        self._sources = sources
        self._index = index
        self._settings = settings
        self._tell = tell
        self._firsts = np.cumsum([0, *(len(source) for source in sources)])
        self._starts = places_of(sizes_of(sources), index.ctx_len)
        self._carried: _Carried | None = None

    def arrays(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """The arrays of the shard that holds these places."""
        made = empty_arrays(self._index.layouts(stop - start))
        packed: list[_Span] = []
        filled = 0
        for span in self._spans(start, stop):
            count = span.stop - span.start
            is_whole = count == self._places(span.document)
            is_alone = not is_whole or count > self._settings.tokens_at_once
            if is_alone or filled + count > self._settings.tokens_at_once:
                self._read_packed(packed, made, start)
                packed, filled = [], 0
            if is_alone:
                self._read_alone(span, made, start)
                continue
            packed.append(span)
            filled += count
        self._read_packed(packed, made, start)
        return made

    def _spans(self, start: int, stop: int) -> Iterator[_Span]:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        for document in range(first, last):
            begin = int(self._starts[document])
            span = _Span(document, max(start - begin, 0), min(stop - begin, self._places(document)))
            if span.stop > span.start:
                yield span

    def _places(self, document: int) -> int:
        return int(self._starts[document + 1] - self._starts[document])

    def _tokens(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        part = int(np.searchsorted(self._firsts, document, side="right")) - 1
        source = self._sources[part]
        first = int(source.starts[document - int(self._firsts[part])])
        return source.tokens(first + start, stop - start).astype(np.int64)

    def _read_packed(self, spans: Sequence[_Span], made: dict[str, NDArray[Any]], start: int) -> None:
        """Read whole documents one behind another, none of which sees another."""
        if not spans:
            return
        tokens = np.concatenate([self._tokens(*span) for span in spans])
        first = int(self._starts[spans[0].document]) - start
        row = self._row(tokens)._replace(sequences=Sequences([span.stop for span in spans]))
        for read in read_in_chunks(self._model, row):
            # documents without places lie between others in the data, and take none
            self._store(words_of(self._model, read, self._index.top_k, self._index.temperatures,
                                 chunk_rows=self._settings.chunk_rows), made, first, len(tokens))
        made["tokens"][first : first + len(tokens)] = tokens
        self._tell(len(tokens))

    def _read_alone(self, span: _Span, made: dict[str, NDArray[Any]], start: int) -> None:
        """Read one document, from where it was left or from its beginning, up to the last place that is wanted."""
        carried, self._carried = self._carried, None
        read, state = 0, None
        if carried is not None and (carried.document, carried.read) == (span.document, span.start):
            read, state = carried.read, carried.state
        # where the places of the document would begin in the shard
        offset = int(self._starts[span.document]) - start
        while read < span.stop:
            # a chunk ends where the wanted places begin, so that no head is computed for nothing
            end = min(read + self._settings.tokens_at_once, span.start if read < span.start else span.stop)
            tokens = self._tokens(span.document, read, end)
            (found,) = read_in_chunks(self._model, self._row(tokens), state=state)
            state = found.state
            if read >= span.start:
                words = words_of(self._model, found, self._index.top_k, self._index.temperatures,
                                 chunk_rows=self._settings.chunk_rows)
                self._store(words, made, offset + read, len(tokens))
                made["tokens"][offset + read : offset + end] = tokens
                self._tell(len(tokens))
            read = end
        if state is not None and read < self._places(span.document):
            self._carried = _Carried(span.document, read, state)

    def _row(self, tokens: NDArray[np.int64]) -> TokenBatch:
        ids = torch.from_numpy(tokens)[None].to(self._model.emb.weight.device)
        nothing = torch.zeros(ids.shape, device=ids.device)
        return TokenBatch(ids, ids, nothing, nothing.sum())

    def _store(
        self, words: Iterator[tuple[Tensor | slice, Likeliest]], made: dict[str, NDArray[Any]], first: int, count: int
    ) -> None:
        """Put words into the shard's arrays, from place ``first`` on."""
        for place, found in words:
            assert isinstance(place, slice)
            part = slice(first + place.start, first + min(place.stop, count))
            made["ids"][part] = found.ids.cpu().numpy()
            logprobs = found.logprobs.cpu().float().numpy()
            made["logprobs"][part] = to_bf16(logprobs) if self._index.dtype == "bf16" else logprobs
            made["normalisers"][:, part] = found.normalisers.cpu().numpy()
            made["tails"][:, part] = found.tails.cpu().numpy()
