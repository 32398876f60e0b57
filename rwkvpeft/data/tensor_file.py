"""Files of named arrays in the safetensors format, written whole and read a part at a time.

A file is 8 bytes, the length of its header; the header, a JSON object that says of each array its dtype, shape and
place; and the arrays, one behind another. Source: https://github.com/huggingface/safetensors, section Format. Parts
are read as ``FileArray`` does it: a memory map of a file that is cut short would kill the process.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.atomic import write_whole
from rwkvpeft.data.file_array import FileArray
from rwkvpeft.errors import UserError
from rwkvpeft.reading import open_file

_BF16 = "BF16"
_DTYPES: dict[str, np.dtype[Any]] = {
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    # numpy has no such numbers: their bits
    _BF16: np.dtype("<u2"),
}
_ALIGNED = 8


class Layout(NamedTuple):
    """What a file is to hold of one array: one of the format's dtypes (BF16: the bits, as uint16) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def size_of_layout(layouts: Mapping[str, Layout]) -> int:
    """Bytes of a file that holds these arrays."""
    return len(_header(layouts)) + sum(layout.bytes for layout in layouts.values())


def empty_arrays(layouts: Mapping[str, Layout]) -> dict[str, NDArray[Any]]:
    """Arrays of zeros, to be filled and written."""
    return {name: np.zeros(layout.shape, _DTYPES[layout.dtype]) for name, layout in layouts.items()}


def write_arrays(path: Path, layouts: Mapping[str, Layout], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as their layouts say, whole or not at all. Raises: NotWrittenError as ``write_whole``."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(_header(layouts))
            for name, layout in layouts.items():
                file.write(np.ascontiguousarray(arrays[name], dtype=_DTYPES[layout.dtype]).tobytes())

    write_whole(path, write)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bf16 numbers, ties to even; for finite numbers."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def holds(path: Path, layouts: Mapping[str, Layout]) -> bool:
    """Whether a file is there, is as long as it has to be, and says of itself that it holds these arrays."""
    if not path.is_file() or path.stat().st_size != size_of_layout(layouts):
        return False
    expected = _header(layouts)
    with open_file(path) as file:
        return file.read(len(expected)) == expected


class TensorFile:
    """A file of arrays that ``write_arrays`` wrote, of which parts are read; it stays open.

    What the file says of itself is compared and not used: no place or size is taken from it.

    Raises: UserError if the file cannot be opened or holds other arrays.
    """

    def __init__(self, path: Path, layouts: Mapping[str, Layout]) -> None:
        self.path = path
        place, self._places = len(_header(layouts)), {}
        for name, layout in layouts.items():
            self._places[name] = layout, place
            place += layout.bytes
        if path.is_file() and not holds(path, layouts):
            expected = ", ".join(f"{name} {layout.dtype} {layout.shape}" for name, layout in layouts.items())
            raise UserError(f"{path} does not hold what it should, or is cut short",
                            found=f"{path.stat().st_size} bytes", expected=f"{place} bytes: {expected}")
        self._content = FileArray(path, np.dtype(np.uint8), place)

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Entries ``start`` to ``stop`` - 1 of an array along its first axis, bf16 as fp32.

        Raises: FileChanged if the file is not what it was when it was opened.
        """
        layout, place = self._places[name]
        dtype = _DTYPES[layout.dtype]
        row = math.prod(layout.shape[1:]) * dtype.itemsize
        content = self._content.read(place + start * row, (stop - start) * row)
        values = content.view(dtype).reshape(stop - start, *layout.shape[1:])
        return (values.astype(np.uint32) << 16).view(np.float32) if layout.dtype == _BF16 else values

    def read_row(self, name: str, row: int, start: int, stop: int) -> NDArray[np.float32]:
        """Entries ``start`` to ``stop`` - 1 of one row of an array of two axes. Raises: as ``read``."""
        layout, place = self._places[name]
        dtype = _DTYPES[layout.dtype]
        first = place + (row * layout.shape[1] + start) * dtype.itemsize
        found: NDArray[np.float32] = self._content.read(first, (stop - start) * dtype.itemsize).view(dtype)
        return found


def _header(layouts: Mapping[str, Layout]) -> bytes:
    entries, place = {}, 0
    for name, layout in layouts.items():
        end = place + layout.bytes
        entries[name] = {"dtype": layout.dtype, "shape": list(layout.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return struct.pack("<Q", len(text)) + text
