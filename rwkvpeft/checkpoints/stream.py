"""Write a file of tensors one tensor at a time, so that a model larger than memory can be written.

``.pth`` is the zip layout of ``torch.save``: ``data.pkl`` describes the dict, ``data/0``, ``data/1``... are the raw
storages, each aligned to 64 bytes, so that ``torch.load(..., weights_only=True, mmap=True)`` reads it.
``.safetensors`` is a json header and the raw data.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from rwkvpeft.errors import ContractError, UserError

FORMATS = ("pth", "safetensors")

_ALIGNMENT = 64
_SLICE_BYTES = 1 << 24
_LARGE_BYTES = 1 << 30
_ZIP_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
# the identifier torch.save gives its own padding
_PADDING_ID = 0x4246

_STORAGES: dict[torch.dtype, tuple[str, str]] = {
    torch.float64: ("DoubleStorage", "F64"),
    torch.float32: ("FloatStorage", "F32"),
    torch.float16: ("HalfStorage", "F16"),
    torch.bfloat16: ("BFloat16Storage", "BF16"),
    torch.int64: ("LongStorage", "I64"),
    torch.int32: ("IntStorage", "I32"),
    torch.int16: ("ShortStorage", "I16"),
    torch.int8: ("CharStorage", "I8"),
    torch.uint8: ("ByteStorage", "U8"),
    torch.bool: ("BoolStorage", "BOOL"),
}
"""Each dtype's class in ``data.pkl`` and its word in a safetensors header."""


class Spec(NamedTuple):
    """Shape and dtype of a tensor to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.elements * self.dtype.itemsize


def write_tensors(
    path: Path, specs: Mapping[str, Spec], produce: Callable[[str], Tensor], *, format: str = "pth"
) -> None:
    """Write the tensors named in ``specs``, in that order.

    Args:
        produce: gives the tensor of a name; called once for each, and its result is not kept.
        format: one of ``FORMATS``.
    Raises: UserError for a dtype the format cannot hold; ContractError if a tensor is not as its spec says; OSError.
    """
    for name, spec in specs.items():
        if spec.dtype not in _STORAGES:
            raise UserError(f"{name} has a dtype that cannot be written", found=spec.dtype, expected=list(_STORAGES))
    write = {"pth": _write_pth, "safetensors": _write_safetensors}[format]

    def checked(name: str) -> Tensor:
        tensor = produce(name)
        if Spec(tuple(tensor.shape), tensor.dtype) != specs[name]:
            raise ContractError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} was made, {specs[name]} announced")
        return tensor

    write(path, specs, checked)


def _write_pth(path: Path, specs: Mapping[str, Spec], produce: Callable[[str], Tensor]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write_record(archive, "archive/data.pkl", _description(specs))
        _write_record(archive, "archive/byteorder", b"little")
        for index, (name, spec) in enumerate(specs.items()):
            info = _aligned(archive, f"archive/data/{index}", spec.bytes)
            with archive.open(info, "w", force_zip64=spec.bytes > _LARGE_BYTES) as record:
                _write_data(record, produce(name))
        _write_record(archive, "archive/version", b"3\n")


def _write_record(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    with archive.open(_aligned(archive, name, len(data)), "w") as record:
        record.write(data)


def _aligned(archive: zipfile.ZipFile, name: str, size: int) -> zipfile.ZipInfo:
    """A zip entry whose data starts at a multiple of 64 bytes: torch maps it into memory as it is."""
    info = zipfile.ZipInfo(name)
    assert archive.fp is not None
    header = _ZIP_HEADER_BYTES + len(name) + (_ZIP64_EXTRA_BYTES if size > _LARGE_BYTES else 0)
    padding = -(archive.fp.tell() + header + 4) % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    return info


class _Storage(NamedTuple):
    key: str
    spec: Spec


class _Pickler(pickle.Pickler):
    """Pickles ``_Storage`` where torch.save would pickle a tensor."""

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, _Storage):
            return NotImplemented
        shape = thing.spec.shape
        strides = tuple(Spec(shape[axis + 1 :], torch.uint8).elements for axis in range(len(shape)))
        # the reference is wrapped: a bare _Storage would come back here without end
        return torch._utils._rebuild_tensor_v2, (_Reference(thing), 0, shape, strides, False, OrderedDict())

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, _Reference):
            return None
        key, spec = thing.storage
        return "storage", getattr(torch, _STORAGES[spec.dtype][0]), key, "cpu", spec.elements


class _Reference:
    def __init__(self, storage: _Storage) -> None:
        self.storage = storage


def _description(specs: Mapping[str, Spec]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({name: _Storage(str(i), spec) for i, (name, spec) in enumerate(specs.items())})
    return buffer.getvalue()


def _write_safetensors(path: Path, specs: Mapping[str, Spec], produce: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.bytes
        header[name] = {"dtype": _STORAGES[spec.dtype][1], "shape": spec.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in specs:
            _write_data(file, produce(name))


def _write_data(file: IO[bytes], tensor: Tensor) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(data), _SLICE_BYTES):
        file.write(data[start : start + _SLICE_BYTES].data)
