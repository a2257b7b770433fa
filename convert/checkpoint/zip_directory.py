"""The directory of a zip file, one entry at a time: `zipfile` makes an object of 600 bytes for each of the 300,000 of MMS's files.

It is read more strictly than `zipfile` reads it, because torch reads it in another way: whatever leads two readers to two
directories, or to two names or places of an entry, is refused.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint.container import release, unreadable
from convert.errors import CheckpointError
from convert.files import PIECE

STORED, DEFLATED = 0, 8
_COMMENT = 65_535  # bytes of the longest comment behind the end record
_END, _LOCATOR, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
_ROW = struct.Struct("<4s4B4H3L5H2L")
_LARGEST = 1 << 26  # bytes of a directory: of MMS it has 32 MB
_WIDE = 0xFFFF_FFFF  # stands for a number that is in the extra field
_NEWEST = 63  # the version of the format that is understood


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the directory.

    Args:
        name: the entry's name.
        method: how it is compressed: `STORED`, `DEFLATED`, or another.
        encrypted: whether it is encrypted.
        crc: the CRC-32 of its bytes.
        packed: how many bytes it takes in the file.
        size: how many bytes it has.
        offset: where its header is.
    """

    name: str
    method: int
    encrypted: bool
    crc: int
    packed: int
    size: int
    offset: int


def read_directory(path: Path, data: mmap.mmap) -> Iterator[Entry]:
    """Yield every entry of a zip file.

    Raises:
        CheckpointError: `truncated` or `hostile-zip`.
    """
    at, end, count = _place(path, data)
    used = at
    for _ in range(count):
        if at + _ROW.size > end or data[at : at + 4] != b"PK\x01\x02":
            raise _damaged(path, "its directory ends early")
        _, _, _, version, _, flags, method, _, _, crc, packed, size, *lengths, _, _, _, offset = _ROW.unpack_from(
            data, at
        )
        name, extra, _ = lengths
        if version > _NEWEST or at + _ROW.size + sum(lengths) > end:
            raise _damaged(path, "an entry of its directory is none")
        at += _ROW.size
        text = _name(path, data[at : at + name], bool(flags & 0x800))
        size, packed, offset = _widened(path, data[at + name : at + name + extra], size, packed, offset)
        yield Entry(text, method, bool(flags & 1), crc, packed, size, offset)
        at += sum(lengths)
        if at - used > PIECE:
            release(data, used, at - used)
            used = at
    if at != end:
        raise _damaged(path, "its directory holds more than its entries")
    release(data, used, at - used)


def _place(path: Path, data: mmap.mmap) -> tuple[int, int, int]:
    """Find the directory: where it starts, where it ends, and the number of its entries."""
    at = data.rfind(b"PK\x05\x06", max(0, len(data) - _END.size - _COMMENT))
    if at < 0 or at + _END.size > len(data):
        raise _damaged(path, "it has no end record")
    *_, count, size, start, _ = _END.unpack_from(data, at)
    wide = at - _LOCATOR.size - _END64.size
    if wide >= 0 and data[at - _LOCATOR.size : at].startswith(b"PK\x06\x07"):
        _, _, at, _ = _LOCATOR.unpack_from(data, at - _LOCATOR.size)
        if at != wide or not data[at : at + 4] == b"PK\x06\x06":
            raise _damaged(path, "its end record is not where it says")
        *_, count, size, start = _END64.unpack_from(data, at)
    if size > _LARGEST:
        raise unreadable(path, "has a larger zip directory than any trainer writes", "hostile-zip")
    if start + size != at:
        raise _damaged(path, "its directory is not where it says")
    return start, at, count


def _name(path: Path, data: bytes, is_utf8: bool) -> str:
    try:
        name = data.decode("utf-8" if is_utf8 else "cp437")
    except UnicodeDecodeError:
        raise _damaged(path, "an entry's name is not text") from None
    if "\0" in name:  # where the name ends for some readers
        raise unreadable(path, f"holds an entry with two names, {name!r} one of them", "hostile-zip")
    if ".." in name.split("/") or name.startswith("/") or "\\" in name:
        raise unreadable(path, f"holds the entry {name!r}, which torch never writes", "hostile-zip")
    return name


def _widened(path: Path, extra: bytes, *numbers: int) -> list[int]:
    """Return numbers, those that take more than 32 bits from the extra fields."""
    wide, at = b"", 0
    while at + 4 <= len(extra):
        kind, count = struct.unpack_from("<2H", extra, at)
        at += 4 + count
        if at > len(extra):
            raise _damaged(path, "an entry's extra field ends early")
        if kind == 0x7075:  # Python from 3.12 on takes a name from there, earlier ones and torch do not
            raise unreadable(path, "holds an entry with two names, one of them in an extra field", "hostile-zip")
        wide = wide or (extra[at - count : at] if kind == 1 else b"")
    made = []
    for number in numbers:
        if number == _WIDE and len(wide) < 8:
            raise _damaged(path, "an entry's extra field ends early")
        made.append(int.from_bytes(wide[:8], "little") if number == _WIDE else number)
        wide = wide[8:] if number == _WIDE else wide
    return made


def _damaged(path: Path, why: str) -> CheckpointError:
    return unreadable(path, f"is a truncated or damaged zip file ({why})", "truncated")
