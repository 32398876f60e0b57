"""The binidx format: ``PREFIX.bin`` holds tokens end to end, ``PREFIX.idx`` where each document lies.

``.idx``: 9 bytes ``MMIDIDX\\0\\0``; uint64 version 1; uint8 type of the tokens; uint64 number of documents n; uint64
number of document marks n + 1; int32 sizes[n]; int64 byte pointers[n]; int64 marks[n + 1]. All little endian.

Source: the indexed dataset of Megatron-LM, as RWKV-LM's ``src/binidx.py`` reads and writes it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from rwkvpeft.atomic import make_durable, partial_beside, writing
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.file_array import FileArray, Stamp
from rwkvpeft.data.mask_file import begin_mask, finish_mask, pair_fingerprint, read_mask
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.voices import Spoken, Voice
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.reading import open_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _TYPES.items()}
_FLOATS = {6: "float32", 7: "float64"}
_AT_ONCE = 1 << 20
_LARGEST_DOCUMENT = (1 << 31) - 1
_FIX = "write the pair again with make_data.py"


class BinidxSource(TokenSource):
    """A pair of files, read in parts as they are asked for. Workers that are handed one open the files themselves."""

    def __init__(self, prefix: str | Path, with_mask: bool = False, stamp: Stamp | None = None) -> None:
        """Open and validate the pair. ``prefix`` may also be the path of either file.

        Args: ``with_mask``: who says each token is read from ``PREFIX.mask``, which must be there and belong to it;
        ``stamp``: of the ``.bin`` as another process opened it.
        Raises: UserError for a missing, empty, damaged, truncated or foreign file, or one that holds floats;
            FileChanged if ``stamp`` is of another file.
        """
        self.prefix = _without_suffix(prefix)
        index_path, tokens_path = _pair(self.prefix)
        self.name = str(tokens_path)
        _require_both(index_path, tokens_path)
        index = _Index(index_path)
        self.sizes = index.sizes
        index.check_pointers(tokens_path)
        self.starts = index.pointers // index.dtype.itemsize if index.dtype.itemsize > 1 else index.pointers
        count = tokens_path.stat().st_size // index.dtype.itemsize
        self._tokens = self.stream = FileArray(tokens_path, index.dtype, count, stamp=stamp)
        self._mask: tuple[FileArray, tuple[Voice, ...]] | None = None
        if with_mask:
            path = mask_path(self.prefix)
            self._mask = read_mask(path, len(self.stream), pair_fingerprint(tokens_path, index_path))
            self.notes = (f"who says each token is read from {path}",)

    def spoken(self, index: int) -> Spoken | None:
        """See ``TokenSource``; None without a mask."""
        if self._mask is None:
            return None
        start = int(self.starts[index])
        return Spoken(self._mask[0].read(start, int(self.sizes[index])), self._mask[1])

    def __reduce__(self) -> tuple[type[BinidxSource], tuple[Path, bool, Stamp]]:
        # sizes and starts are read again sooner than they come through a pipe
        return BinidxSource, (self.prefix, self._mask is not None, self._tokens.stamp)


def open_binidx(config: DataConfig) -> BinidxSource:
    """The pair ``--data_file`` names, with its mask where there is one and the settings go by it.

    Raises: UserError as ``BinidxSource`` does.
    """
    path = mask_path(_without_suffix(config.data_file))
    goes_by_it = config.loss_mask in ("qa", "last") or config.mask_think
    source = BinidxSource(config.data_file, goes_by_it and path.exists())
    if path.exists() and not goes_by_it:
        source.notes = (f"{path} is not read: --loss_mask {config.loss_mask} does not go by turns",)
    return source


def mask_path(prefix: Path) -> Path:
    """The mask of the pair ``prefix``."""
    return prefix.with_name(prefix.name + ".mask")


class _Index:
    """The contents of an ``.idx`` file; every count is compared with the file's size before it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file_bytes = path.stat().st_size
        with open_file(path) as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UserError(f"{path} is not a binidx index", found=header[:9], expected=_MAGIC, fix=_FIX)
        _, version, code, count, marks = _HEADER.unpack(header)
        if version != _VERSION:
            raise UserError(f"{path} has an unknown version", found=version, expected=_VERSION)
        if code not in _TYPES:
            kind = _FLOATS.get(code, "unknown")
            raise UserError(
                f"{path} says that the tokens are not integers",
                found=f"type code {code} ({kind})",
                expected=[f"{known} ({np.dtype(name)})" for known, name in _TYPES.items()],
            )
        self.dtype = np.dtype(_TYPES[code])
        expected_bytes = _HEADER.size + 12 * count + 8 * marks
        if expected_bytes != file_bytes:
            raise UserError(
                f"{path} is damaged or cut short",
                found=f"{file_bytes} bytes",
                expected=f"{expected_bytes} bytes for {count} documents and {marks} marks",
                fix=_FIX,
            )
        if count == 0:
            raise UserError(f"{path} lists no document", fix=_FIX)
        self.sizes = FileArray(path, np.dtype("<i4"), count, _HEADER.size)[:]
        self.pointers = FileArray(path, np.dtype("<i8"), count, _HEADER.size + 4 * count)[:]

    def check_pointers(self, tokens_path: Path) -> None:
        """Compare every document's place with the size of the ``.bin``, in parts, so that no copy is made of it all."""
        file_bytes = tokens_path.stat().st_size
        item = self.dtype.itemsize
        covered = 0
        for first in range(0, len(self.sizes), _AT_ONCE):
            sizes = self.sizes[first : first + _AT_ONCE].astype(np.int64)
            pointers = self.pointers[first : first + _AT_ONCE]
            # pointers are compared before anything is added to them, for a hostile one would overflow
            bad = (sizes < 0) | (pointers < 0) | (pointers > file_bytes) | (pointers % item != 0)
            bad |= sizes * item > file_bytes - np.clip(pointers, 0, file_bytes)
            if bad.any():
                self._refuse(first + int(np.argmax(bad)), tokens_path, file_bytes)
            covered = max(covered, int((pointers + sizes * item).max()))
        if covered != file_bytes:
            raise UserError(
                f"{tokens_path} and {self.path} do not belong together",
                found=f"{file_bytes} bytes of tokens",
                expected=f"{covered} bytes, where the last document ends",
                fix=_FIX,
            )

    def _refuse(self, document: int, tokens_path: Path, file_bytes: int) -> None:
        size, pointer = int(self.sizes[document]), int(self.pointers[document])
        raise UserError(
            f"{tokens_path} is cut short, or {self.path} is damaged: document {document} does not lie in it",
            found=f"{file_bytes} bytes",
            expected=f"{size} tokens of {self.dtype.itemsize} bytes from byte {pointer}",
            fix=_FIX,
        )


class BinidxWriter:
    """Writes a pair bit by bit; the pair appears when the ``with`` block ends well, and not at all otherwise."""

    def __init__(
        self, prefix: str | Path, dtype: npt.DTypeLike = np.uint16, voices: Sequence[Voice] | None = None
    ) -> None:
        """Args: ``prefix`` of the files; ``dtype`` of the tokens, one of the format's integer types; ``voices``: what
        the codes given with the documents stand for, if a mask is to be written with the pair."""
        self._index_path, self._tokens_path = _pair(Path(prefix))
        self._mask_path = mask_path(Path(prefix))
        self._voices = voices
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            raise ContractError(f"binidx cannot store tokens of type {self.dtype}")
        self._code = _CODES[self.dtype]
        self.n_documents = 0
        self.n_tokens = 0

    def __enter__(self) -> BinidxWriter:
        self._partial_index = partial_beside(self._index_path)
        self._partial_tokens = partial_beside(self._tokens_path)
        self._partial_mask = partial_beside(self._mask_path)
        with writing(self._tokens_path):
            self._tokens_path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._index = self._partial_index.open("w+b")
                self._tokens = self._partial_tokens.open("wb")
                if self._voices is not None:
                    self._mask = self._partial_mask.open("wb")
                    begin_mask(self._mask)
            except BaseException:
                self._discard()
                raise
        # sizes follow the header at once; counts are filled in at the end
        self._index.write(bytes(_HEADER.size))
        return self

    def add(
        self, documents: Iterable[memoryview], sizes: npt.NDArray[np.integer], codes: Iterable[memoryview] = ()
    ) -> None:
        """Append documents: their tokens in the writer's type, the size of each in tokens, and their voices' codes."""
        with writing(self._tokens_path):
            self._tokens.writelines(documents)
            if self._voices is not None:
                self._mask.writelines(codes)
            self._index.write(sizes.astype("<i4").tobytes())
        self.n_documents += len(sizes)
        self.n_tokens += int(sizes.sum(dtype=np.int64))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self._tokens_path):
                    self._finish_index()
                    self._commit()
        finally:
            self._discard()

    def _finish_index(self) -> None:
        index, size_bytes, pointer = self._index, 4 * self.n_documents, 0
        for first in range(0, size_bytes, 4 * _AT_ONCE):
            index.seek(_HEADER.size + first)
            sizes = np.frombuffer(index.read(min(4 * _AT_ONCE, size_bytes - first)), dtype="<i4")
            ends = pointer + np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
            index.seek(0, os.SEEK_END)
            index.write((ends - sizes.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes())
            pointer = int(ends[-1])
        for first in range(0, self.n_documents + 1, _AT_ONCE):
            marks = np.arange(first, min(first + _AT_ONCE, self.n_documents + 1), dtype="<i8")
            index.write(marks.tobytes())
        index.seek(0)
        index.write(_HEADER.pack(_MAGIC, _VERSION, self._code, self.n_documents, self.n_documents + 1))

    def _commit(self) -> None:
        for file, path in ((self._index, self._partial_index), (self._tokens, self._partial_tokens)):
            file.close()
            make_durable(path)
        if self._voices is not None:
            fingerprint = pair_fingerprint(self._partial_tokens, self._partial_index)
            finish_mask(self._mask, self.n_tokens, self._voices, fingerprint)
            self._mask.close()
            make_durable(self._partial_mask)
        # an older index beside newer tokens would be read as a whole pair; none at all is found out at once
        self._index_path.unlink(missing_ok=True)
        # and an older mask is of other tokens
        self._mask_path.unlink(missing_ok=True)
        os.replace(self._partial_tokens, self._tokens_path)
        if self._voices is not None:
            os.replace(self._partial_mask, self._mask_path)
        os.replace(self._partial_index, self._index_path)
        make_durable(self._tokens_path.parent)

    def _discard(self) -> None:
        files = {"_index": self._partial_index, "_tokens": self._partial_tokens, "_mask": self._partial_mask}
        for name, path in files.items():
            # closing writes what is still buffered, which fails on a full disk
            with contextlib.suppress(OSError):
                if hasattr(self, name):
                    getattr(self, name).close()
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def write_binidx(
    prefix: str | Path, documents: Iterable[npt.ArrayLike], dtype: npt.DTypeLike = np.uint16
) -> None:
    """Write documents, each with its final 0, as ``prefix``.bin and ``prefix``.idx; both appear, or neither.

    Raises: UserError if the files cannot be written, a token does not fit ``dtype``, or a document is too long for
        the format. What ``documents`` raises passes through; nothing stays behind then either.
    """
    with BinidxWriter(prefix, dtype) as writer:
        limits = np.iinfo(writer.dtype)
        for number, document in enumerate(documents):
            tokens = np.asarray(document)
            if len(tokens) > _LARGEST_DOCUMENT:
                raise UserError(f"document {number} has {len(tokens)} tokens", expected=f"at most {_LARGEST_DOCUMENT}")
            if len(tokens) and (int(tokens.min()) < limits.min or int(tokens.max()) > limits.max):
                raise UserError(
                    f"document {number} holds a token id that {writer.dtype} cannot store",
                    found=int(tokens.max()),
                    expected=f"{limits.min} to {limits.max}",
                )
            writer.add([np.ascontiguousarray(tokens, dtype=writer.dtype).data], np.array([len(tokens)]))


def _without_suffix(prefix: str | Path) -> Path:
    path = Path(prefix)
    named_a_file = path.suffix in (".bin", ".idx") and not path.with_name(path.name + ".idx").exists()
    return path.with_suffix("") if named_a_file else path


def _pair(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")


def _require_both(index_path: Path, tokens_path: Path) -> None:
    missing = [str(path) for path in (index_path, tokens_path) if not path.is_file()]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'does' if len(missing) == 1 else 'do'} not exist",
            expected=f"the pair {tokens_path.name} and {index_path.name}",
            fix="check --data_file (without .bin), or write the pair with make_data.py",
        )
