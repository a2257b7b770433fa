"""Write a zip file without compression, entry by entry, with the bytes that Python's `zipfile` would write.

`zipfile` keeps an object of half a kilobyte for each entry until the end, of which there are 300,000 in MMS's files. This keeps the
entries' rows of the directory.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import BinaryIO

_VERSION = 45  # of the format, with sizes and offsets of 64 bits
_UNIX, _MODE = 3, 0o600 << 16
_DATE = 1 << 5 | 1  # the first of January 1980, as torch's own entries: the same model gives the same bytes
SIZE, _COUNT = (1 << 31) - 1, (1 << 16) - 1  # above which `zipfile` writes 64 bits
_MANY = 0xFFFF_FFFF


class ZipWriter:
    """Writes a zip file; use it in a `with` statement, at whose end the directory is written.

    Args:
        file: an empty file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.rows = bytearray()
        self.count = 0

    def __enter__(self) -> ZipWriter:
        return self

    @contextlib.contextmanager
    def entry(self, name: str) -> Iterator[Callable[[bytes], None]]:
        """Write an entry: its bytes are given to what this yields."""
        start, crc, size = self.file.tell(), 0, 0
        encoded, flags = name.encode(), 0 if name.isascii() else 0x800

        def write(piece: bytes) -> None:
            nonlocal crc, size
            self.file.write(piece)
            crc, size = zlib.crc32(piece, crc), size + len(piece)

        self.file.write(_header(encoded, flags, 0, 0))
        yield write
        end = self.file.tell()
        self.file.seek(start)
        self.file.write(_header(encoded, flags, crc, size))
        self.file.seek(end)
        large = [size, size] if size > SIZE else []
        short = _MANY if large else size
        large += [start] if start > SIZE else []
        extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        row = (b"PK\x01\x02", _VERSION, _UNIX, _VERSION, 0, flags, 0, 0, _DATE, crc, short, short)
        sizes = (len(encoded), len(extra), 0, 0, 0, _MODE, _MANY if start > SIZE else start)
        self.rows += struct.pack("<4s4B4H3L5H2L", *row, *sizes) + encoded + extra
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        at, size, count = self.file.tell(), len(self.rows), self.count
        self.file.write(self.rows)
        if count > _COUNT or at > SIZE or size > SIZE:
            record = (b"PK\x06\x06", 44, _VERSION, _VERSION, 0, 0, count, count, size, at)
            self.file.write(struct.pack("<4sQ2H2L4Q", *record))
            self.file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, at + size, 1))
            count, size, at = min(count, _COUNT), min(size, _MANY), min(at, _MANY)
        self.file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, at, 0))


def _header(name: bytes, flags: int, crc: int, size: int) -> bytes:
    """An entry's own header; its sizes have 64 bits, whatever they are."""
    known = (b"PK\x03\x04", _VERSION, 0, flags, 0, 0, _DATE, crc, _MANY, _MANY, len(name), 20)
    return struct.pack("<4s2B4H3L2H", *known) + name + struct.pack("<2H2Q", 1, 16, size, size)
