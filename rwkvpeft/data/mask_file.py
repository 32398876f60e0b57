"""The mask beside binidx: ``PREFIX.mask`` says for each token of ``PREFIX.bin`` who says it.

8 bytes ``RWKVMASK``; uint64 number of tokens n, little endian; uint8 codes[n], in the order of the ``.bin``; then, up
to the end, one JSON object in UTF-8: ``voices``, for each code ``[weight, is_answer, is_last,
is_think]`` as in ``voices.Voice``, and ``fingerprint`` of the pair the mask belongs to.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkvpeft.data.file_array import FileArray
from rwkvpeft.data.voices import Voice
from rwkvpeft.errors import UserError
from rwkvpeft.reading import open_file

_MAGIC = b"RWKVMASK"
_HEADER = struct.Struct("<8sQ")
_AT_ONCE = 1 << 24
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_LARGEST_FOOTER = 1 << 20


def begin_mask(file: BinaryIO) -> None:
    """Leave room for the header; the codes follow."""
    file.write(bytes(_HEADER.size))


def finish_mask(file: BinaryIO, n_tokens: int, voices: Sequence[Voice], fingerprint: str) -> None:
    """Write what stands behind the codes, and the header."""
    file.write(json.dumps({"voices": voices, "fingerprint": fingerprint}).encode())
    file.seek(0)
    file.write(_HEADER.pack(_MAGIC, n_tokens))


def pair_fingerprint(tokens_path: Path, index_path: Path) -> str:
    """Tells one pair from another: of each file its size and, unless it is small, evenly spread samples."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (tokens_path, index_path):
        size = path.stat().st_size
        digest.update(struct.pack("<Q", size))
        with path.open("rb") as file:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_mask(
    path: Path, n_tokens: int, fingerprint: str
) -> tuple[FileArray, tuple[Voice, ...]]:
    """The codes and the voices they stand for.

    Raises: UserError if the file is damaged, or belongs to a pair with other tokens.
    """
    with open_file(path) as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise _damaged(path, f"it begins with {header[:8]!r}, not with {_MAGIC!r}")
        count = _HEADER.unpack(header)[1]
        size = file.seek(0, 2)
        if not 0 < size - _HEADER.size - count <= _LARGEST_FOOTER:
            raise _damaged(path, f"{size} bytes for {count} tokens")
        file.seek(_HEADER.size + count)
        voices, belongs_to = _footer(path, file.read())
    if count != n_tokens or belongs_to != fingerprint:
        raise UserError(
            f"{path} belongs to other tokens than those beside it",
            found=f"a mask of {count} tokens" + (", of the same number but others" if count == n_tokens else ""),
            expected=f"one of the {n_tokens} tokens of {path.with_suffix('.bin').name}",
            fix="write it again with make_data.py --mask, or remove it to find answers in the text",
        )
    codes = FileArray(path, np.dtype(np.uint8), count, _HEADER.size)
    for start in range(0, count, _AT_ONCE):
        if int(codes[start : start + _AT_ONCE].max()) >= len(voices):
            raise _damaged(path, f"a code above {len(voices) - 1}")
    return codes, voices


def _footer(path: Path, content: bytes) -> tuple[tuple[Voice, ...], object]:
    try:
        footer = json.loads(content)
        voices = tuple(Voice(float(weight), *map(bool, flags)) for weight, *flags in footer["voices"])
        fingerprint = footer["fingerprint"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as reason:
        raise _damaged(path, "no list of voices at its end") from reason
    if not all(0 <= voice.weight < math.inf for voice in voices):
        raise _damaged(path, "a weight below 0")
    return voices, fingerprint


def _damaged(path: Path, found: str) -> UserError:
    return UserError(f"{path} is no mask, or damaged", found=found, fix="write it again with make_data.py --mask")
