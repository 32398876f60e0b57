"""Where the parts of a ``.pth`` lie in its file: the zip that ``torch.save`` writes, no number of which is trusted.

Parts are stored as they are, so that they can be mapped; a compressed one, which may be a thousand times larger than
its file, is refused.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.6 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_IS_ENCRYPTED = 1
_IN_EXTRA = 0xFFFFFFFF
_ZIP64 = 1
# a checkpoint of 30 thousand tensors has a directory of 3 MB
_LARGEST_DIRECTORY = 1 << 25


class ArchiveError(ValueError):
    """A zip that is broken, or not as ``torch.save`` writes it; the message says why, in one line."""


class Part(NamedTuple):
    """``start`` is where its bytes begin in the file."""

    start: int
    size: int


class _Entry(NamedTuple):
    header: int
    size: int


class Archive:
    """The directory of an archive.

    Attributes:
        root: the folder within the archive that all parts lie in.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Raises: ArchiveError; OSError."""
        self._file = file
        self._bytes = file.seek(0, 2)
        count, size, self._directory = self._find_directory()
        if size > _LARGEST_DIRECTORY:
            raise ArchiveError(f"a list of {size} bytes of what is in it")
        self._entries = _entries(self._read(self._directory, size), count)
        # parts that lie over each other: much would come out of little
        if sum(entry.size for entry in self._entries.values()) > self._directory:
            raise ArchiveError("parts that are larger than the file")
        self.root = next(iter(self._entries), "").partition("/")[0]

    def __contains__(self, name: str) -> bool:
        return f"{self.root}/{name}" in self._entries

    def part(self, name: str) -> Part:
        """Where the part ``name`` lies. Raises: ArchiveError if there is none, or it does not lie in the file."""
        entry = self._entries.get(f"{self.root}/{name}")
        if entry is None:
            raise ArchiveError(f"no part {name[:80]}")
        header = self._read(entry.header, _LOCAL.size)
        mark, *_, name_bytes, extra_bytes = _LOCAL.unpack(header)
        start = entry.header + _LOCAL.size + name_bytes + extra_bytes
        if mark != b"PK\3\4" or start + entry.size > self._directory:
            raise ArchiveError(f"the part {name[:80]} does not lie in it")
        return Part(start, entry.size)

    def content(self, name: str, largest: int) -> bytes:
        """The bytes of a small part. Raises: ArchiveError as ``part``, or if it has more than ``largest``."""
        part = self.part(name)
        if part.size > largest:
            raise ArchiveError(f"a part {name} of {part.size} bytes")
        return self._read(part.start, part.size)

    def _find_directory(self) -> tuple[int, int, int]:
        """The directory's number of entries, its bytes and where it begins."""
        tail_start = max(self._bytes - _LONGEST_COMMENT - _END.size, 0)
        tail = self._read(tail_start, self._bytes - tail_start)
        place = tail.rfind(b"PK\5\6")
        if place < 0 or place + _END.size > len(tail):
            raise ArchiveError("no list of what is in it: the file is cut short")
        end = tail_start + place
        _, _, _, _, count, size, start, _ = _END.unpack_from(tail, place)
        if end >= _LOCATOR.size:
            mark, _, place_64, _ = _LOCATOR.unpack(self._read(end - _LOCATOR.size, _LOCATOR.size))
            if mark == b"PK\6\7":
                mark, _, _, _, _, _, _, count, size, start = _END_64.unpack(self._read(place_64, _END_64.size))
                if mark != b"PK\6\6":
                    raise ArchiveError("a broken list of what is in it")
        if start + size > end:
            raise ArchiveError("a broken list of what is in it")
        return count, size, start

    def _read(self, start: int, size: int) -> bytes:
        if start + size > self._bytes:
            raise ArchiveError("a part that lies outside of it: the file is cut short")
        self._file.seek(start)
        content = self._file.read(size)
        if len(content) != size:
            raise ArchiveError("the file is cut short")
        return content


def _entries(directory: bytes, count: int) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    place = 0
    while place + _ENTRY.size <= len(directory):
        fields = _ENTRY.unpack_from(directory, place)
        mark, _, _, flags, method, _, _, _, stored, size, name_bytes, extra_bytes, comment_bytes, *_, header = fields
        name_end = place + _ENTRY.size + name_bytes
        if mark != b"PK\1\2" or name_end + extra_bytes + comment_bytes > len(directory):
            raise ArchiveError("a broken list of what is in it")
        name = directory[place + _ENTRY.size : name_end].decode("utf-8", errors="replace")
        extra = directory[name_end : name_end + extra_bytes]
        size, stored, header = _wide((size, stored, header), extra)
        if method or flags & _IS_ENCRYPTED or size != stored:
            raise ArchiveError(f"the part {name[:80]} is compressed or encrypted, as torch.save never writes it")
        if name in entries:
            raise ArchiveError(f"two parts {name[:80]}")
        entries[name] = _Entry(header, size)
        place = name_end + extra_bytes + comment_bytes
    if len(entries) != count:
        raise ArchiveError(f"{len(entries)} parts where {count} are announced")
    return entries


def _wide(values: tuple[int, ...], extra: bytes) -> tuple[int, ...]:
    """Numbers that do not fit into 32 bits stand in the zip64 field, in this order."""
    if _IN_EXTRA not in values:
        return values
    place = 0
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, place)
        if kind == _ZIP64:
            field = extra[place + 4 : place + 4 + size]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            return tuple(next(wide, value) if value == _IN_EXTRA else value for value in values)
        place += 4 + size
    return values
