"""What a ``.pth`` holds and where its numbers lie, of both formats ``torch.save`` has had, without loading a number.

The zip of today is read through ``archive``. The older format is five pickles (a mark, a version, the machine, the
value, the keys of its storages) and then, for each key, an int64 count and the raw numbers.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rwkvpeft.checkpoints.archive import Archive, ArchiveError, Part
from rwkvpeft.checkpoints.pickled import PickleError, Storage, StoredTensor, read_pickle

ZIP_MARK = b"PK\3\4"
_OLD_MARK = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001
_COUNT = struct.Struct("<q")
# a file of 30 thousand tensors describes them in 5 MB
_LARGEST_DESCRIPTION = 1 << 24
# what one storage lends to several tensors, as tied weights: all tensors together against the file
_LARGEST_SHARING = 4
_LARGEST_NUMBER = 16


class Contents:
    """A file's value, in which each tensor is a ``StoredTensor``, and the place of every storage."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Raises: ForeignError for anything but plain values and tensors; ArchiveError or PickleError, both
        ValueErrors, for a broken file; OSError."""
        self.path = path
        self._bytes = file.seek(0, 2)
        file.seek(0)
        is_zip = file.read(len(ZIP_MARK)) == ZIP_MARK
        source = _Zip(file) if is_zip else _Old(file)
        self.value: Any = source.value
        self._parts = source.parts

    def map(self, named: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """The tensors, through one private memory map of the file.

        Raises: ValueError if one does not lie in the file, or they are far larger than it; RuntimeError if the file
            cannot be mapped.
        """
        if sum(tensor.elements * tensor.dtype.itemsize for tensor in named.values()) > _LARGEST_SHARING * self._bytes:
            raise PickleError("tensors that are far larger than the file")
        # places are looked at before anything is mapped
        places = {tensor.storage: _placed(self._parts, tensor.storage) for tensor in named.values()}
        whole: Any = torch.UntypedStorage.from_file(str(self.path), False, self._bytes)
        storages = {storage: _slice(whole, place) for storage, place in places.items()}
        return {name: _view(tensor, storages[tensor.storage]) for name, tensor in named.items()}


class _Zip:
    def __init__(self, file: BinaryIO) -> None:
        archive = Archive(file)
        if "byteorder" in archive and archive.content("byteorder", 16) != b"little":
            raise ArchiveError("numbers of a big-endian machine")
        seen: dict[str, Storage] = {}
        self.value = read_pickle(io.BytesIO(archive.content("data.pkl", _LARGEST_DESCRIPTION)), seen)
        self.parts = {key: archive.part(f"data/{key}") for key in seen}


class _Old:
    def __init__(self, file: BinaryIO) -> None:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        data = io.BytesIO(file.read(_LARGEST_DESCRIPTION))
        if read_pickle(data) != _OLD_MARK or read_pickle(data) != _OLD_VERSION:
            raise PickleError("no file of tensors")
        # what machine it was
        read_pickle(data)
        seen: dict[str, Storage] = {}
        self.value = read_pickle(data, seen)
        keys = read_pickle(data)
        if type(keys) is not list or any(type(key) is not str or key not in seen for key in keys):
            raise PickleError("a broken list of its numbers")
        self.parts: dict[str, Part] = {}
        place = data.tell()
        for key in keys:
            file.seek(place)
            count = file.read(_COUNT.size)
            size = seen[key].elements * seen[key].dtype.itemsize
            if len(count) < _COUNT.size or _COUNT.unpack(count)[0] != seen[key].elements:
                raise PickleError("another number of numbers than announced")
            self.parts[key] = Part(place + _COUNT.size, size)
            place += _COUNT.size + size
            if place > file_bytes:
                raise PickleError("the file is cut short")


def _placed(parts: Mapping[str, Part], storage: Storage) -> Part:
    part, size = parts.get(storage.key), storage.elements * storage.dtype.itemsize
    if part is None or size > part.size:
        raise ArchiveError(f"{part.size if part else 0} bytes where {size} of numbers are announced")
    return Part(part.start, size)


def _slice(whole: Any, part: Part) -> torch.UntypedStorage:
    found: torch.UntypedStorage = whole[part.start : part.start + part.size]
    # numbers across the borders of words; torch.save never writes them so in a zip
    return found.clone() if part.start % _LARGEST_NUMBER else found


def _view(tensor: StoredTensor, storage: torch.UntypedStorage) -> Tensor:
    if not tensor.elements:
        return torch.empty_strided(tensor.shape, tensor.stride, dtype=tensor.dtype)
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.offset, tensor.shape, tensor.stride)
