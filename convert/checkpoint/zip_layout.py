"""torch's zip layout: where each entry's bytes are. Compressed entries are unpacked first."""

from __future__ import annotations

import heapq
import io
import mmap
import os
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from convert.checkpoint.container import (
    Container,
    Opened,
    Range,
    check_crc,
    corrupted,
    release,
    tensors_in,
    unreadable,
)
from convert.checkpoint.foreign import archive_of
from convert.checkpoint.unpickle import load
from convert.checkpoint.zip_directory import DEFLATED, STORED, Entry, read_directory
from convert.errors import CheckpointError
from convert.files import scratch_file

_PICKLE = 1 << 28  # bytes of the largest pickle
_PIECE, _ALIGNED = 1 << 20, 64
_GROWTH, _SLACK = 16, 1 << 24  # what is unpacked has at most so many times the file's bytes, and some more


def open_zip(path: Path, original: Opened) -> Container:
    """Read the directory and the pickle of a zip file; see `convert.checkpoint.layouts.open_container`."""
    data = original.data
    names = [entry.name for entry in read_directory(path, data) if entry.name.rpartition("/")[2] == "data.pkl"]
    pickles = sorted(set(names))
    if not pickles:
        raise archive_of(path, [entry.name for entry in read_directory(path, data)])
    if len(pickles) > 1:
        raise unreadable(path, f"holds {' and '.join(pickles[:3])}: several checkpoints", "foreign-file", "unpack it")
    prefix = pickles[0].removesuffix("data.pkl")
    ranges, others = _Ranges(f"{prefix}data/"), dict[str, Entry]()
    for entry in read_directory(path, data):
        if entry.name in others or ranges.key(entry) in ranges.index:
            raise unreadable(path, f"holds the entry {entry.name!r} twice", "corrupted-zip")
        if ranges.key(entry):
            ranges.add(entry, _range(path, original, entry))
        else:
            others[entry.name] = entry
    if f"{prefix}constants.pkl" in others:
        what = "is a TorchScript program, in which the names of fairseq's tensors and its settings are lost"
        raise unreadable(path, what, "foreign-file", "name the checkpoint that it was made from")
    if f"{prefix}byteorder" in others and _read(path, original, others[f"{prefix}byteorder"]) != b"little":
        raise unreadable(path, "was written on a big-endian machine", "byteorder")
    index = others[pickles[0]]
    if index.size > _PICKLE:
        raise unreadable(path, f"has a pickle of {index.size} bytes, larger than any trainer writes", "hostile-zip")
    where, behind = _range(path, original, index), 0
    for place in ranges.in_order(where):
        if place.start < behind and place.count:  # a small file that pretends to be a large one
            raise unreadable(path, f"entry {place.entry} overlaps another one", "hostile-zip")
        behind = max(behind, place.start + place.count)
    if index.method == STORED:
        check_crc(path, data, where)
        loaded = load(data, where.start, path.name, where.start + where.count)
        release(data, where.start, where.count)
    else:
        loaded = load(_read(path, original, index), 0, path.name)
    container = Container(path, "zip", original, loaded.value, loaded.globals, ranges, unpacked=len(data))
    if ranges.packed:
        _pack(container, {key: entry for entry in read_directory(path, data) if (key := ranges.key(entry))})
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
        self.packed = False

    def key(self, entry: Entry) -> str:
        """The name of an entry in the folder; empty for one that is elsewhere."""
        return entry.name[len(self.folder) :] if entry.name.startswith(self.folder) else ""

    def add(self, entry: Entry, where: Range) -> None:
        self.packed |= entry.method != STORED
        self.index[self.key(entry)] = len(self.starts)
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
        keys = sorted(self.index, key=lambda key: self.starts[self.index[key]])
        return heapq.merge(map(self.__getitem__, keys), [other], key=lambda place: place.start)


def _range(path: Path, original: Opened, entry: Entry) -> Range:
    """Find an entry's bytes: its local header may be longer than the directory says (torch pads it to align tensors)."""
    if entry.encrypted:
        raise unreadable(path, "is an encrypted zip file", "compressed-entry", "unzip it, and zip it again: zip -0 -r")
    if entry.method not in (STORED, DEFLATED):
        what = f"entry {entry.name} is compressed by method {entry.method}, which is not read here"
        raise unreadable(path, what, "compressed-entry", "unzip it, and zip it again without compression: zip -0 -r")
    if entry.method == STORED and entry.packed != entry.size:
        raise unreadable(path, f"entry {entry.name} is stored, and has two sizes", "corrupted-zip")
    at = entry.offset
    header = os.pread(original.file.fileno(), 30, at) if at < len(original.data) else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise unreadable(path, f"entry {entry.name} has no header", "corrupted-zip")
    start = at + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + entry.packed > len(original.data):
        raise unreadable(path, f"entry {entry.name} ends behind the file", "truncated")
    return Range(start, entry.packed, entry.crc, entry.name)


def _read(path: Path, original: Opened, entry: Entry) -> bytes:
    """Read a small entry into memory."""
    if entry.size > _GROWTH * len(original.data) + _SLACK:
        raise _too_large(path, entry.size)
    made = io.BytesIO()
    _inflate(path, original, entry, made)
    return made.getvalue()


def _pack(container: Container, listed: dict[str, Entry]) -> None:
    """Give the storages of a compressed file the places that they will have once it is unpacked."""
    path, original = container.path, container.original
    at = 0
    places: dict[str, Range] = {}
    for key, entry in listed.items():
        places[key] = Range(at, entry.size, entry.crc, entry.name)
        at += -(-entry.size // _ALIGNED) * _ALIGNED
    if at > _GROWTH * len(original.data) + _SLACK:
        raise _too_large(path, at)

    def unpack() -> Opened:
        file = scratch_file()  # closed, and removed, with the container
        try:
            for key, entry in listed.items():
                file.seek(places[key].start)
                _inflate(path, original, entry, file)
            file.truncate(at)
            file.flush()
            return Opened(file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except BaseException:
            file.close()
            raise

    container.storages, container.unpack, container.unpacked = places, unpack, at


def _inflate(path: Path, original: Opened, entry: Entry, file: BinaryIO) -> None:
    """Write an entry's bytes, no more than the directory says that there are, and hold them against its CRC-32."""
    where, crc, count = _range(path, original, entry), 0, 0
    for piece in _pieces(path, original.data, entry, where):
        crc, count = zlib.crc32(piece, crc), count + len(piece)
        if count > entry.size:
            break
        file.write(piece)
    if (count, crc) != (entry.size, entry.crc):
        raise corrupted(path, where)


def _pieces(path: Path, data: mmap.mmap, entry: Entry, where: Range) -> Iterator[bytes]:
    machine = None if entry.method == STORED else zlib.decompressobj(-zlib.MAX_WBITS)
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
