"""torch's zip layout: where each entry's bytes are; those of a file that was zipped anew, and so compressed, are unpacked."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.checkpoint.container import Container, Opened, Range, corrupted, peek, release, tensors_in, unreadable
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
    if f"{prefix}byteorder" in entries and _read(path, data, entries[f"{prefix}byteorder"]) != b"little":
        raise unreadable(path, "was written on a big-endian machine", "byteorder")
    index, folder = entries[pickles[0]], f"{prefix}data/"
    if index.file_size > _PICKLE:
        what = f"has a pickle of {index.file_size} bytes, larger than any trainer writes"
        raise unreadable(path, what, "hostile-zip")
    listed = {name[len(folder) :]: info for name, info in entries.items() if name.startswith(folder) and name != folder}
    ranges = {key: _range(path, data, info) for key, info in listed.items()}
    where, behind = _range(path, data, index), 0
    for place in sorted((where, *ranges.values()), key=lambda place: (place.start, place.count)):
        if place.start < behind and place.count:  # a small file that pretends to be a large one
            raise unreadable(path, f"entry {place.entry} overlaps another one", "hostile-zip")
        behind = max(behind, place.start + place.count)
    if _is_stored(index):
        _check_crc(path, data, where)
        loaded = load(data, where.start, path.name, where.start + where.count)
    else:
        loaded = load(_read(path, data, index), 0, path.name)
    container = Container(path, "zip", original, loaded.value, loaded.globals, ranges, unpacked=len(data))
    if not all(map(_is_stored, listed.values())):
        _pack(container, listed)
    for tensor in tensors_in(loaded.value, path.name):
        found = container.storages.get(tensor.storage.key)
        need = tensor.storage.count * container.width_of(tensor.storage.type)
        if found is None or found.count != need:
            have = "none" if found is None else str(found.count)
            raise unreadable(path, f"storage {tensor.storage.key}: {need} bytes expected, {have} found", "truncated")
    return container


def _entries(path: Path, original: Opened) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    if _directory_size(original.data) > _DIRECTORY:
        raise unreadable(path, "has a larger zip directory than any trainer writes", "hostile-zip")
    try:
        with zipfile.ZipFile(original.file) as archive:
            for info in archive.infolist():
                if info.filename in entries:
                    raise unreadable(path, f"holds the entry {info.filename!r} twice", "corrupted-zip")
                entries[info.filename] = info
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
        raise unreadable(path, f"is a truncated or damaged zip file ({error})", "truncated") from None
    for name in entries:
        if ".." in name.split("/") or name.startswith("/") or "\\" in name:
            raise unreadable(path, f"holds the entry {name!r}, which torch never writes", "hostile-zip")
    return entries


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


def _range(path: Path, data: mmap.mmap, info: zipfile.ZipInfo) -> Range:
    """Find an entry's bytes: its local header may be longer than the directory says (torch pads it to align tensors)."""
    if info.flag_bits & 1:
        raise unreadable(path, "is an encrypted zip file", "compressed-entry", "unzip it, and zip it again: zip -0 -r")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        what = f"entry {info.filename} is compressed by method {info.compress_type}, which is not read here"
        raise unreadable(path, what, "compressed-entry", "unzip it, and zip it again without compression: zip -0 -r")
    if _is_stored(info) and info.compress_size != info.file_size:
        raise unreadable(path, f"entry {info.filename} is stored, and has two sizes", "corrupted-zip")
    at = info.header_offset
    header = peek(data, at, 30)
    if at < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise unreadable(path, f"entry {info.filename} has no header", "corrupted-zip")
    start = at + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.compress_size > len(data):
        raise unreadable(path, f"entry {info.filename} ends behind the file", "truncated")
    return Range(start, info.compress_size, info.CRC, info.filename)


def _read(path: Path, data: mmap.mmap, info: zipfile.ZipInfo) -> bytes:
    """Read a small entry into memory."""
    if info.file_size > _GROWTH * len(data) + _SLACK:
        raise _too_large(path, info.file_size)
    made = io.BytesIO()
    _inflate(path, data, info, made)
    return made.getvalue()


def _pack(container: Container, listed: dict[str, zipfile.ZipInfo]) -> None:
    """Give the storages of a compressed file the places that they will have once it is unpacked."""
    path, original = container.path, container.original
    at = 0
    for key, info in listed.items():
        container.storages[key] = Range(at, info.file_size, info.CRC, info.filename)
        at += -(-info.file_size // _ALIGNED) * _ALIGNED
    if at > _GROWTH * len(original.data) + _SLACK:
        raise _too_large(path, at)

    def unpack() -> Opened:
        file = scratch_file()  # closed, and removed, with the container
        try:
            for key, info in listed.items():
                file.seek(container.storages[key].start)
                _inflate(path, original.data, info, file)
            file.truncate(at)
            file.flush()
            return Opened(file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except BaseException:
            file.close()
            raise

    container.unpack, container.unpacked = unpack, at


def _inflate(path: Path, data: mmap.mmap, info: zipfile.ZipInfo, file: Any) -> None:
    """Write an entry's bytes, no more than the directory says that there are, and hold them against its CRC-32."""
    where, crc, count = _range(path, data, info), 0, 0
    for piece in _pieces(path, data, info, where):
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
