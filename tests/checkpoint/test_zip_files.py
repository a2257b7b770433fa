"""Our reader and writer of zip files against Python's `zipfile`, and what readers of zip files disagree about."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.checkpoint import zip_writer
from convert.checkpoint.container import Opened
from convert.checkpoint.layouts import open_container
from convert.checkpoint.zip_directory import read_directory
from convert.checkpoint.zip_writer import ZipWriter
from convert.errors import CheckpointError

ENTRIES = {
    "none": {},
    "few": {"model/data.pkl": b"N.", "model/data/0": b"", "model/\u00e9": b"x" * 999},
    "many": {f"model/data/{index}": b"%d" % index for index in range(70_000)},
}


def pythons(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                entry.write(data)
    return stream.getvalue()


def ours(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with ZipWriter(stream) as archive:
        for name, data in entries.items():
            with archive.entry(name) as write:
                write(data[:3])
                write(data[3:])
    return stream.getvalue()


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("name", ENTRIES)
def test_the_bytes_are_those_of_zipfile(name: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:  # sizes and offsets that 32 bits do not hold, without a file of their size
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 200)
        monkeypatch.setattr(zip_writer, "SIZE", 200)
    assert ours(ENTRIES[name]) == pythons(ENTRIES[name])


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("name", ["few", "many"])
def test_the_directory_is_that_of_zipfile(
    name: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zip_writer, "SIZE", 200 if large else zip_writer.SIZE)
    path = tmp_path / "model.pt"
    path.write_bytes(ours(ENTRIES[name]))
    expected = [
        (row.filename, row.compress_type, False, row.CRC, row.compress_size, row.file_size, row.header_offset)
        for row in zipfile.ZipFile(path).infolist()
    ]
    found = rows(path)
    assert found == expected


def rows(path: Path) -> list[tuple[object, ...]]:
    with path.open("rb") as file:
        opened = Opened(file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return [
            (row.name, row.method, row.encrypted, row.crc, row.packed, row.size, row.offset)
            for row in read_directory(path, opened.data)
        ]


def end(data: bytes, **numbers: int) -> bytes:
    """Change numbers of the end record."""
    at = data.rindex(b"PK\x05\x06")
    names = ("disk", "start_disk", "here", "count", "size", "offset", "comment")
    found = dict(zip(names, struct.unpack_from("<4H2LH", data, at + 4), strict=True)) | numbers
    return data[: at + 4] + struct.pack("<4H2LH", *found.values()) + data[at + 22 :]


def row(data: bytes, at: int, kind: str, value: int) -> bytes:
    """Change a number of the first row of the directory."""
    start = data.index(b"PK\x01\x02") + at
    return data[:start] + struct.pack(kind, value) + data[start + struct.calcsize(kind) :]


# What leads two readers of zip files to two directories, or is none -> the change
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "fewer-entries": lambda data: end(data, count=1),
    "more-entries": lambda data: end(data, count=9),
    "directory-elsewhere": lambda data: end(data, offset=4),
    "shorter-directory": lambda data: end(data, size=46),
    "bytes-between": lambda data: data.replace(b"PK\x05\x06", b"\0PK\x05\x06"),
    "no-end-record": lambda data: data[:-22],
    "newer-version": lambda data: row(data, 6, "<B", 64),
    "name-longer-than-the-directory": lambda data: row(data, 28, "<H", 0xFFFF),
    "size-in-an-extra-field-that-is-not-there": lambda data: row(data, 24, "<L", 0xFFFFFFFF),
    "offset-in-an-extra-field-that-is-not-there": lambda data: row(data, 42, "<L", 0xFFFFFFFF),
    "not-utf-8": lambda data: row(data, 8, "<H", 0x800).replace(b"model/data.pkl", b"model/data.pk\xff"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_directory_that_readers_read_differently(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    whole = ours(ENTRIES["few"])
    path.write_bytes(whole)
    open_container(path).close()  # the control
    path.write_bytes(DAMAGES[name](whole))
    with pytest.raises(CheckpointError) as raised:
        open_container(path)
    assert raised.value.code == "truncated"
