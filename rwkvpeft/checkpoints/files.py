"""Tensor files: written whole or not at all, read without running anything they contain."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkvpeft.atomic import write_whole
from rwkvpeft.checkpoints.contents import ZIP_MARK, Contents
from rwkvpeft.checkpoints.pickled import ForeignError, StoredTensor
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import normalise_names
from rwkvpeft.reading import open_file

# a memory map counts as the process's memory once read; it is opened anew after this much
_REOPEN_BYTES = 128 << 20
_SAMPLE_BYTES = 1 << 16
_SAMPLES = 64
# what the system says of a map that does not fit, and PyTorch of numbers
_NO_ROOM = (os.strerror(errno.ENOMEM), "can't allocate memory", "not enough memory")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a flat dict of tensors as a ``.pth``; a crash at any moment leaves an older file whole.

    Tensors are detached, moved to the CPU and made contiguous; aliases of one storage are written once each. Equal
    tensors make equal files, byte for byte.
    Raises: UserError if the file cannot be written.
    """
    plain = {name: _own_storage(tensor) for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        # given a path, torch.save would write the name of the partial file into the archive
        with partial.open("wb") as file:
            torch.save(plain, file)

    write_whole(path, write)


def _own_storage(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    # a view would drag its whole storage into the file
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a ``.pth`` of tensors through a memory map; nothing in it is run, and no number in it is trusted.

    Numbers that do not lie on borders of words, as in the old, non-zip format, are read into memory. A checkpoint that
    nests its weights under ``state_dict``, ``module`` or ``model`` is unwrapped.
    Raises: UserError if the file is missing, broken, or holds anything but tensors by name; MemoryError if there is no
        room for the map.
    """
    path = Path(path)
    if not os.path.isfile(path):
        what = "does not exist" if not os.path.exists(path) else "is no file"
        raise UserError(f"{path} {'is a folder, not a file' if os.path.isdir(path) else what}",
                        expected="a .pth file of tensors", fix="check the path")
    try:
        with open_file(path) as file:
            contents = Contents(path, file)
        return contents.map(_named(contents.value, path))
    except ForeignError as reason:
        raise UserError(
            f"{path} holds more than tensors and is not opened",
            found=reason,
            expected="a file of tensors by name, as torch.save(model.state_dict(), path) writes it",
        ) from reason
    except (ValueError, RuntimeError, OSError) as reason:
        found = str(reason).partition("\n")[0]
        if any(words in found for words in _NO_ROOM):
            raise MemoryError(f"no room to read {path}: {found}") from reason
        raise UserError(
            f"{path} cannot be read as a checkpoint",
            found=found,
            expected="a complete .pth file",
            fix="download or copy it again and compare its size",
        ) from reason


def is_zip(path: Path | str) -> bool:
    """Whether a file begins as those do that ``torch.save`` writes today. Raises: UserError if it cannot be read."""
    with open_file(path) as file:
        return file.read(len(ZIP_MARK)) == ZIP_MARK


def _named(value: object, path: Path) -> dict[str, StoredTensor]:
    """The tensors by name that a file's value is, or has under one of the usual names."""
    for key in ("state_dict", "module", "model"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not all(
        type(name) is str and type(tensor) is StoredTensor for name, tensor in value.items()
    ):
        raise UserError(f"{path} is not a dict of tensors by name", found=type(value).__name__.strip("_").lower())
    unreadable = next((name for name in value if not name.isprintable()), None)
    if unreadable is not None:
        raise UserError(f"{path} holds a tensor whose name cannot be shown", found=ascii(unreadable[:80]))
    return value


class MappedTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by their official names, read through a memory map that is given back from time to time.

    A tensor lives as long as something refers to it; copy what is to be kept, or its part of the map stays in memory.

    Args:
        path: a ``.pth``; see ``load_tensors`` for what is read and refused.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._tensors = normalise_names(load_tensors(path))
        self._read_bytes = 0
        self.outline = {name: tensor.to("meta") for name, tensor in self._tensors.items()}
        """Every tensor's shape and dtype, as tensors without data."""

    def __getitem__(self, name: str) -> Tensor:
        read_bytes = self.outline[name].nbytes
        if not self._tensors or self._read_bytes + read_bytes > _REOPEN_BYTES:
            self.release()
            self._tensors = normalise_names(load_tensors(self.path))
        self._read_bytes += read_bytes
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)

    def __contains__(self, name: object) -> bool:
        return name in self.outline

    def release(self) -> None:
        """Give the map back; the next tensor opens it again."""
        self._tensors, self._read_bytes = {}, 0


def outline_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor's shape and dtype, as tensors without data."""
    if isinstance(tensors, MappedTensors):
        return dict(tensors.outline)
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def fingerprint(path: Path | str) -> str:
    """A short hash that tells two checkpoints apart without reading all of a large file.

    BLAKE2b over the file's size and 64 samples of 64 KiB spread evenly over it, the first and last bytes included.
    """
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    last = max(size - _SAMPLE_BYTES, 0)
    with open_file(path) as file:
        for offset in sorted({last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
