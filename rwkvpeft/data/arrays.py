"""``--data_type numpy`` and ``uint16``: token ids as arrays.

Each row of a table is a document. A single row is one stream, whose documents end at token 0.

Source: RWKV-LM, ``RWKV-v4neo/src/dataset.py``, which reads ``uint16`` in rows of ``--my_sample_len`` tokens.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.file_array import FileArray, Stamp
from rwkvpeft.data.jsonl import require_readable
from rwkvpeft.data.source import Tokens, TokenSource
from rwkvpeft.data.tokenizer import END_OF_DOCUMENT
from rwkvpeft.errors import UserError

# tokens of real text become a third to a tenth by packing
_LARGEST_INFLATION, _ALWAYS_INFLATED = 50, 1 << 26
_SEARCHED_AT_ONCE = 1 << 26
_LARGEST_DOCUMENT = np.iinfo(np.int32).max


class ArraySource(TokenSource):
    """Tokens (n_tokens,) end to end, or (rows, tokens); a file is read in parts where its format allows it."""

    def __init__(self, config: DataConfig, tokens: Tokens, reopen: Callable[[DataConfig], ArraySource]) -> None:
        """Args: ``reopen`` makes the same source of ``config`` again.

        Raises: UserError if the array is empty, holds no whole numbers or has more than two axes.
        """
        name = config.data_file
        if tokens.ndim not in (1, 2) or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
            raise UserError(
                f"{name} is no array of tokens",
                found=f"{tokens.dtype}, {' x '.join(map(str, tokens.shape)) or 'a single value'}",
                expected="whole numbers, (tokens,) or (documents, tokens)",
            )
        self.name = name
        self._again = reopen, config
        self.stream = _flat(tokens)
        if tokens.ndim == 2:
            rows, length = tokens.shape
            ends = np.arange(1, rows + 1, dtype=np.int64) * length
        else:
            ends = _ends(self.stream)
        self.sizes = np.diff(ends, prepend=0).astype(np.int32)
        self.starts = ends - self.sizes

    def __reduce__(
        self,
    ) -> tuple[Callable[..., ArraySource], tuple[Callable[[DataConfig], ArraySource], DataConfig, Stamp | None]]:
        stamp = self.stream.stamp if isinstance(self.stream, FileArray) else None
        return _open_again, (*self._again, stamp)


def open_numpy(config: DataConfig) -> ArraySource:
    """A ``.npy`` file, or a ``.npz`` that holds one array. Nothing is unpickled.

    Raises: UserError if the file is anything else.
    """
    path = Path(config.data_file)
    require_readable(path)
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return ArraySource(config, loaded, open_numpy)
        with loaded as arrays:
            if len(arrays.files) != 1:
                raise UserError(f"{path} holds several arrays", found=arrays.files, expected="one, the tokens")
            _require_sober(arrays.zip, path)
            array = arrays[arrays.files[0]]
            if not isinstance(array, np.ndarray):
                raise ValueError("what it holds is no array")
            return ArraySource(config, array, open_numpy)
    except (ValueError, TypeError, OverflowError, KeyError, MemoryError, NotImplementedError, RuntimeError, OSError,
            EOFError, SyntaxError, tokenize.TokenError, zlib.error, zipfile.BadZipFile) as reason:
        found = (str(reason).splitlines() or [type(reason).__name__])[0]
        raise UserError(f"{path} is not an array of numpy", found=found,
                        expected="what numpy.save or numpy.savez wrote, without Python objects") from reason


def open_uint16(config: DataConfig) -> ArraySource:
    """A file of little-endian 16-bit token ids and nothing else, mapped; with ``my_sample_len`` in rows of that length.

    Raises: UserError if the file's size does not fit.
    """
    path = Path(config.data_file)
    require_readable(path)
    row_bytes = 2 * (config.my_sample_len or 1)
    size = path.stat().st_size
    if not size or size % row_bytes:
        rows = f"--my_sample_len {config.my_sample_len}, {row_bytes} bytes each" if config.my_sample_len else "2 bytes"
        raise UserError(f"{path} does not hold whole {'rows' if config.my_sample_len else 'tokens'}",
                        found=f"{size} bytes", expected=f"a multiple of {rows}")
    tokens: Tokens = np.memmap(path, dtype="<u2", mode="r")
    return ArraySource(
        config, tokens.reshape(-1, config.my_sample_len) if config.my_sample_len else tokens, open_uint16
    )


def _open_again(reopen: Callable[[DataConfig], ArraySource], config: DataConfig, stamp: Stamp | None) -> ArraySource:
    """The same source in another process."""
    source = reopen(config)
    if stamp is not None and isinstance(source.stream, FileArray):
        source.stream.require(stamp)
    return source


def _flat(tokens: Tokens) -> Tokens | FileArray:
    """All tokens end to end; of a mapped array what reads them from its file."""
    if isinstance(tokens, np.memmap) and tokens.flags.c_contiguous and tokens.filename is not None:
        return FileArray(Path(tokens.filename), tokens.dtype, tokens.size, tokens.offset)
    return np.asarray(tokens).reshape(-1)


def _require_sober(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse an archive that would fill the memory from a few bytes. Raises: UserError."""
    inflated = sum(item.file_size for item in archive.infolist())
    if inflated > max(_LARGEST_INFLATION * path.stat().st_size, _ALWAYS_INFLATED):
        raise UserError(f"{path} becomes {inflated} bytes when it is unpacked", found=f"{path.stat().st_size} bytes",
                        expected=f"at most {_LARGEST_INFLATION} times as much", fix="save it with numpy.save")


def _ends(tokens: Tokens | FileArray) -> npt.NDArray[np.int64]:
    """Where the documents of a stream end: behind each token 0, and where it ends itself."""
    found = [
        np.flatnonzero(tokens[start : start + _SEARCHED_AT_ONCE] == END_OF_DOCUMENT) + start + 1
        for start in range(0, len(tokens), _SEARCHED_AT_ONCE)
    ]
    ends = np.union1d(np.concatenate(found), [len(tokens)])
    if int(np.diff(ends, prepend=0).max()) <= _LARGEST_DOCUMENT:
        return ends
    # the sizes of documents are 32-bit numbers
    return np.union1d(ends, np.arange(_LARGEST_DOCUMENT, len(tokens), _LARGEST_DOCUMENT))
