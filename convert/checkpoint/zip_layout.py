"""torch's zip layout: where each entry's bytes are; those of a file that was zipped anew, and so compressed, are unpacked."""

from __future__ import annotations

import heapq
import io
import mmap
import os
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from convert.checkpoint.container import Container, Opened, Range, corrupted, release, tensors_in, unreadable
from convert.checkpoint.foreign import archive_of
from convert.checkpoint.unpickle import load
from convert.errors import CheckpointError
from convert.files import scratch_file

# the zip's end record with the longest comment; bytes of the largest directory, and of the largest pickle
_END, _DIRECTORY, _PICKLE = 22 + 65_535, 1 << 26, 1 << 28
_PIECE, _ALIGNED = 1 << 20, 64
_GROWTH, _SLACK = 16, 1 << 24  # what is unpacked has at most so many times the file's bytes, and some more


def open_zip(path: Path, original: Opened) -> Container:
    """Read the directory and the pickle of a zip file; see `convert.checkpoint.layouts.open_container`."""
    data = original.data
    entries = _entries(path, original)
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if not pickles:
        raise archive_of(path, list(entries))
    if len(pickles) > 1:
        raise unreadable(path, f"holds {' and '.join(pickles[:3])}: several checkpoints", "foreign-file", "unpack it")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        what = "is a TorchScript program, in which the names of fairseq's tensors and its settings are lost"
        raise unreadable(path, what, "foreign-file", "name the checkpoint that it was made from")
    if f"{prefix}byteorder" in entries and _read(path, original, entries[f"{prefix}byteorder"]) != b"little":
        raise unreadable(path, "was written on a big-endian machine", "byteorder")
    index, folder = entries[pickles[0]], f"{prefix}data/"
    if index.file_size > _PICKLE:
        what = f"has a pickle of {index.file_size} bytes, larger than any trainer writes"
        raise unreadable(path, what, "hostile-zip")
    where, behind = _range(path, original, index), 0
    inside = [name for name in entries if name.startswith(folder) and name != folder]
    stored = all(_is_stored(entries[name]) for name in inside)
    listed = {} if stored else {name[len(folder) :]: entries[name] for name in inside}
    ranges = _Ranges(folder)
    for name in inside:  # the entries of 300,000 tensors take more memory than all else that is kept of them
        ranges.add(name[len(folder) :], _range(path, original, entries.pop(name)))
    for place in ranges.in_order(where):
        if place.start < behind and place.count:  # a small file that pretends to be a large one
            raise unreadable(path, f"entry {place.entry} overlaps another one", "hostile-zip")
        behind = max(behind, place.start + place.count)
    if _is_stored(index):
        _check_crc(path, data, where)
        loaded = load(data, where.start, path.name, where.start + where.count)
        release(data, where.start, where.count)
    else:
        loaded = load(_read(path, original, index), 0, path.name)
    container = Container(path, "zip", original, loaded.value, loaded.globals, ranges, unpacked=len(data))
    if not stored:
        _pack(container, listed)
    for tensor in tensors_in(loaded.value, path.name):
        found = container.storages.get(tensor.storage.key)
        need = tensor.storage.count * container.width_of(tensor.storage.type)
        if found is None or found.count != need:
            have = "none" if found is None else str(found.count)
            raise unreadable(path, f"storage {tensor.storage.key}: {need} bytes expected, {have} found", "truncated")
    return container


class _Ranges(Mapping[str, Range]):
    """The places of a zip's entries by the name in their folder; an object for each would take four times the memory."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.index: dict[str, int] = {}
        self.starts, self.counts, self.crcs = array("Q"), array("Q"), array("L")

    def add(self, key: str, where: Range) -> None:
        self.index[key] = len(self.starts)
        self.starts.append(where.start)
        self.counts.append(where.count)
        self.crcs.append(where.crc or 0)

    def __getitem__(self, key: str) -> Range:
        at = self.index[key]
        return Range(self.starts[at], self.counts[at], self.crcs[at], self.folder + key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def in_order(self, other: Range) -> Iterator[Range]:
        """Yield all places, and another one, as they come in the file."""
        keys = sorted(self.index, key=lambda key: (self.starts[self.index[key]], self.counts[self.index[key]]))
        return heapq.merge(map(self.__getitem__, keys), [other], key=lambda place: (place.start, place.count))


def _entries(path: Path, original: Opened) -> dict[str, zipfile.ZipInfo]:
    if _directory_size(original.data) > _DIRECTORY:
        raise unreadable(path, "has a larger zip directory than any trainer writes", "hostile-zip")
    try:
        with zipfile.ZipFile(original.file) as archive:
            entries, listed = archive.NameToInfo, archive.infolist()
            if len(entries) < len(listed):
                twice = next(info.filename for info in listed if entries[info.filename] is not info)
                raise unreadable(path, f"holds the entry {twice!r} twice", "corrupted-zip")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
        raise unreadable(path, f"is a truncated or damaged zip file ({error})", "truncated") from None
    for info in listed:
        # cut at a NUL; or, for Python from 3.12 on and not before, replaced by a name in the extra field 0x7075
        if info.filename != info.orig_filename or b"up" in _fields(info.extra):
            raise unreadable(path, f"holds an entry with two names, {info.filename!r} one of them", "hostile-zip")
    for name in entries:
        if ".." in name.split("/") or name.startswith("/") or "\\" in name:
            raise unreadable(path, f"holds the entry {name!r}, which torch never writes", "hostile-zip")
    return entries


def _fields(extra: bytes) -> list[bytes]:
    """The ids of an entry's extra fields."""
    ids, at = [], 0
    while at + 4 <= len(extra):
        ids.append(extra[at : at + 2])
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return ids


def _directory_size(data: mmap.mmap) -> int:
    """How many bytes `zipfile` would read as the directory, each of which costs it about ten bytes of memory."""
    end = data.rfind(b"PK\x05\x06", max(0, len(data) - _END))
    if end < 0:
        return 0
    size = int.from_bytes(data[end + 12 : end + 16], "little")
    if end < 76 or data[end - 20 : end - 16] != b"PK\x06\x07":
        return size
    records = {end - 76, int.from_bytes(data[end - 12 : end - 4], "little")}  # zip64: where it is, where it says it is
    return max(int.from_bytes(data[at + 40 : at + 48], "little") for at in records)


def _is_stored(info: zipfile.ZipInfo) -> bool:
    return info.compress_type == zipfile.ZIP_STORED


def _range(path: Path, original: Opened, info: zipfile.ZipInfo) -> Range:
    """Find an entry's bytes: its local header may be longer than the directory says (torch pads it to align tensors)."""
    if info.flag_bits & 1:
        raise unreadable(path, "is an encrypted zip file", "compressed-entry", "unzip it, and zip it again: zip -0 -r")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        what = f"entry {info.filename} is compressed by method {info.compress_type}, which is not read here"
        raise unreadable(path, what, "compressed-entry", "unzip it, and zip it again without compression: zip -0 -r")
    if _is_stored(info) and info.compress_size != info.file_size:
        raise unreadable(path, f"entry {info.filename} is stored, and has two sizes", "corrupted-zip")
    at = info.header_offset
    header = os.pread(original.file.fileno(), 30, at) if at >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise unreadable(path, f"entry {info.filename} has no header", "corrupted-zip")
    start = at + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.compress_size > len(original.data):
        raise unreadable(path, f"entry {info.filename} ends behind the file", "truncated")
    return Range(start, info.compress_size, info.CRC, info.filename)


def _read(path: Path, original: Opened, info: zipfile.ZipInfo) -> bytes:
    """Read a small entry into memory."""
    if info.file_size > _GROWTH * len(original.data) + _SLACK:
        raise _too_large(path, info.file_size)
    made = io.BytesIO()
    _inflate(path, original, info, made)
    return made.getvalue()


def _pack(container: Container, listed: dict[str, zipfile.ZipInfo]) -> None:
    """Give the storages of a compressed file the places that they will have once it is unpacked."""
    path, original = container.path, container.original
    at = 0
    places: dict[str, Range] = {}
    for key, info in listed.items():
        places[key] = Range(at, info.file_size, info.CRC, info.filename)
        at += -(-info.file_size // _ALIGNED) * _ALIGNED
    if at > _GROWTH * len(original.data) + _SLACK:
        raise _too_large(path, at)

    def unpack() -> Opened:
        file = scratch_file()  # closed, and removed, with the container
        try:
            for key, info in listed.items():
                file.seek(places[key].start)
                _inflate(path, original, info, file)
            file.truncate(at)
            file.flush()
            return Opened(file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except BaseException:
            file.close()
            raise

    container.storages, container.unpack, container.unpacked = places, unpack, at


def _inflate(path: Path, original: Opened, info: zipfile.ZipInfo, file: BinaryIO) -> None:
    """Write an entry's bytes, no more than the directory says that there are, and hold them against its CRC-32."""
    where, crc, count = _range(path, original, info), 0, 0
    for piece in _pieces(path, original.data, info, where):
        crc, count = zlib.crc32(piece, crc), count + len(piece)
        if count > info.file_size:
            break
        file.write(piece)
    if (count, crc) != (info.file_size, info.CRC):
        raise corrupted(path, where)


def _pieces(path: Path, data: mmap.mmap, info: zipfile.ZipInfo, where: Range) -> Iterator[bytes]:
    machine = None if _is_stored(info) else zlib.decompressobj(-zlib.MAX_WBITS)
    for at in range(where.start, where.start + where.count, _PIECE):
        packed = data[at : min(at + _PIECE, where.start + where.count)]
        if machine is None:
            yield packed
        else:
            try:
                while made := machine.decompress(packed, _PIECE):
                    yield made
                    packed = machine.unconsumed_tail
            except zlib.error:
                raise corrupted(path, where) from None
        release(data, at, _PIECE)


def _too_large(path: Path, count: int) -> CheckpointError:
    what = f"would take {count} bytes unpacked, more than {_GROWTH} times its own size: no model is compressed so far"
    return unreadable(path, what, "size-bomb", "get the checkpoint from its author again")


def _check_crc(path: Path, data: mmap.mmap, where: Range) -> None:
    with memoryview(data) as view, view[where.start : where.start + where.count] as piece:
        if zlib.crc32(piece) != where.crc:
            raise corrupted(path, where)
