"""A folder of a teacher's words about data: what it holds, and where.

Documents lie one behind another, each with as many places as a model predicts tokens of it. The places are cut into
shards, ``labels-00000.safetensors`` and so on. ``index.json`` says how they were made, ``documents.safetensors`` how
long each document is. Letters: D documents, N places of a shard, K tokens that are told apart, t temperatures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.atomic import write_whole
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.tensor_file import Layout, TensorFile, holds, write_arrays
from rwkvpeft.errors import UserError
from rwkvpeft.reading import LARGEST_RECORD_BYTES, read_text

INDEX = "index.json"
DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}

_DOCUMENTS = "documents.safetensors"
_FORMAT = 1
_DIGESTED_AT_ONCE = 1 << 22
_SMALL_VOCABULARY = 1 << 16


@dataclass(frozen=True)
class LabelIndex:
    """How a folder's labels were made.

    Attributes:
        teacher: the model's file name; ``teacher_fingerprint`` tells it, and what is on it, from others.
        vocab_size: tokens the teacher knows.
        top_k: tokens that are told apart, the likeliest.
        dtype: of their log-probabilities at temperature 1, fp16, bf16 or fp32.
        temperatures: those for which the rest of the probability is known.
        ctx_len: tokens of a document that are predicted at most; 0 for all.
        documents, tokens: of the data; ``data_fingerprint`` is that of all tokens.
        places: that have labels.
        shard_places: of each shard but the last.
    """

    teacher: str
    teacher_fingerprint: str
    vocab_size: int
    top_k: int
    dtype: str
    temperatures: tuple[float, ...]
    ctx_len: int
    documents: int
    tokens: int
    data_fingerprint: str
    places: int
    shard_places: int

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.places // self.shard_places)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """The first place of a shard, and the one behind its last."""
        start = shard * self.shard_places
        return start, min(start + self.shard_places, self.places)

    def shard_path(self, folder: Path, shard: int) -> Path:
        """The file of a shard."""
        return folder / f"labels-{shard:05d}.safetensors"

    def layouts(self, places: int) -> dict[str, Layout]:
        """The arrays of a shard: ``tokens`` (N,) that were read at each place; ``ids`` (N, K) of the likeliest next
        ones, ``logprobs`` (N, K); ``normalisers`` and ``tails`` (t, N) as of ``ops.divergence.Likeliest``."""
        ids = "U16" if self.vocab_size <= _SMALL_VOCABULARY else "I32"
        return {
            "tokens": Layout(ids, (places,)),
            "ids": Layout(ids, (places, self.top_k)),
            "logprobs": Layout(DTYPES[self.dtype], (places, self.top_k)),
            "normalisers": Layout("F32", (len(self.temperatures), places)),
            "tails": Layout("F32", (len(self.temperatures), places)),
        }

    @property
    def bytes_per_place(self) -> int:
        """Bytes of the labels of one place."""
        return sum(layout.bytes for layout in self.layouts(1).values())

    def has_shard(self, folder: Path, shard: int) -> bool:
        """Whether a shard is there, and whole."""
        return holds(self.shard_path(folder, shard), self.shard_layouts(shard))

    def shard_layouts(self, shard: int) -> dict[str, Layout]:
        """The arrays of one shard."""
        start, stop = self.shard_range(shard)
        return self.layouts(stop - start)

    @property
    def is_possible(self) -> bool:
        """Whether a folder can hold such labels."""
        counts = (self.vocab_size, self.top_k, self.documents, self.tokens, self.places, self.shard_places)
        known = all(type(value) is float and 0 < value < math.inf for value in self.temperatures)
        return (min(counts) >= 1 and self.ctx_len >= 0 and self.top_k <= self.vocab_size
                and self.dtype in DTYPES and bool(self.temperatures) and known)


def places_of(sizes: NDArray[np.integer], ctx_len: int) -> NDArray[np.int64]:
    """(D + 1,) where each document's places begin, and where the last one's end."""
    predicted = np.maximum(sizes.astype(np.int64) - 1, 0)
    if ctx_len:
        predicted = np.minimum(predicted, ctx_len)
    return np.concatenate([[0], np.cumsum(predicted)])


def sizes_of(sources: Sequence[TokenSource]) -> NDArray[np.int32]:
    """Tokens of each document of all sources."""
    return np.concatenate([source.sizes for source in sources]).astype(np.int32)


def fingerprint_of(sources: Sequence[TokenSource]) -> str:
    """A hash of all tokens, whatever type they are held in."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        for start in range(0, source.n_tokens, _DIGESTED_AT_ONCE):
            tokens = source.tokens(start, min(_DIGESTED_AT_ONCE, source.n_tokens - start))
            digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return digest.hexdigest()


def write_index(folder: Path, index: LabelIndex, sizes: NDArray[np.int32]) -> None:
    """Write what tells about the labels, before the first of them. Raises: NotWrittenError."""
    write_arrays(folder / _DOCUMENTS, _layouts_of_sizes(len(sizes)), {"sizes": sizes})
    text = json.dumps({"format": _FORMAT, **asdict(index)}, indent=1)
    write_whole(folder / INDEX, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_index(folder: Path) -> LabelIndex:
    """What a folder holds. Raises: UserError if there is no index, or it is not one of ours."""
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds no labels of a teacher", expected=f"{INDEX} and shards",
                        fix="python -m rwkvpeft.teacher --output FOLDER writes them")
    try:
        found: Any = json.loads(read_text(folder / INDEX, LARGEST_RECORD_BYTES))
        if found.pop("format") != _FORMAT:
            raise ValueError("format")
        index = LabelIndex(**{**found, "temperatures": tuple(found["temperatures"])})
        kinds = {field.name: type(getattr(index, field.name)).__name__ for field in fields(index)}
        whole = all(kinds[field.name] == str(field.type).partition("[")[0] for field in fields(index))
        if not whole or not index.is_possible:
            raise ValueError("values")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as reason:
        raise UserError(f"{folder / INDEX} is not an index of a teacher's labels", found=str(reason),
                        fix="labels that python -m rwkvpeft.teacher of this version wrote") from reason
    return index


def read_sizes(folder: Path, index: LabelIndex) -> NDArray[np.int32]:
    """Tokens of each document. Raises: UserError as ``TensorFile``, and if they are not those of the index."""
    file = TensorFile(folder / _DOCUMENTS, _layouts_of_sizes(index.documents))
    sizes: NDArray[np.int32] = file.read("sizes", 0, index.documents)
    found = int(sizes.sum(dtype=np.int64)), int(places_of(sizes, index.ctx_len)[-1])
    if found != (index.tokens, index.places) or int(sizes.min()) < 0:
        raise UserError(f"{folder / _DOCUMENTS} and {INDEX} are not of the same labels",
                        found=f"{found[0]} tokens in {found[1]} places",
                        expected=f"{index.tokens} tokens in {index.places} places")
    return sizes


def _layouts_of_sizes(documents: int) -> dict[str, Layout]:
    return {"sizes": Layout("I32", (documents,))}
