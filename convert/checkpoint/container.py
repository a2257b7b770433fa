"""Find the bytes of a torch file's storages, in the zip layout and in the layout before torch 1.6, without reading them."""

from __future__ import annotations

import contextlib
import mmap
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from convert.checkpoint.unpickle import Global, StoredTensor, Stub, load
from convert.errors import CheckpointError

# torch storage class -> (safetensors dtype, bytes an element)
DTYPES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_NEIGHBOURHOOD = 1 << 21
_DEPTH, _NODES = 200, 4_000_000
# the zip's end record with the longest comment; bytes of the largest directory, and of the largest pickle
_END, _DIRECTORY, _PICKLE = 22 + 65_535, 1 << 26, 1 << 28


@dataclass(frozen=True, slots=True)
class Range:
    """Where a storage's bytes are.

    Args:
        start: the first byte in the file.
        count: the number of bytes.
        crc: the CRC-32 that the zip directory records; `None` in the legacy layout, which has none.
        entry: the zip entry's name, or the storage's key.
        file: which of the container's files holds them.
    """

    start: int
    count: int
    crc: int | None
    entry: str
    file: int = 0


@dataclass(slots=True)
class Container:
    """An opened torch file: its unpickled index and the byte ranges of its storages; close it after use.

    Args:
        path: the file.
        kind: `zip` or `legacy`.
        file: the opened file, for reading in bulk.
        data: the mapped file, for looking things up.
        value: the unpickled object, tensors as `StoredTensor`.
        globals: every global that the pickle names.
        storages: the byte range of every storage, by key.
        others: the further files of a checkpoint that lies in several; `storages` then are those of all.
    """

    path: Path
    kind: str
    file: BinaryIO
    data: mmap.mmap
    value: Any
    globals: frozenset[Global]
    storages: dict[str, Range]
    others: tuple[Container, ...] = ()

    @property
    def files(self) -> tuple[Container, ...]:
        """Every file of the checkpoint, in order."""
        return (self, *self.others)

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(len(one.data) for one in self.files)

    def close(self) -> None:
        """Close the files."""
        for one in self.files:
            one.file.close()
            with contextlib.suppress(BufferError):  # an error's traceback may still hold a view; it is unmapped with it
                one.data.close()

    def dtype(self, tensor: StoredTensor) -> tuple[str, int]:
        """Return a tensor's safetensors dtype and its bytes an element."""
        return self.dtype_of(tensor.storage.type)

    def dtype_of(self, storage: str) -> tuple[str, int]:
        """Return the same for a storage class of torch's."""
        known = DTYPES.get(storage)
        if known is None:
            raise CheckpointError(
                f"{self.path.name}: storage type {storage} is not supported; nothing was written",
                code="unsupported-dtype",
                key=storage,
            )
        return known


def open_container(path: Path) -> Container:
    """Open a torch file and read its index; no tensor byte is read.

    Args:
        path: a file written by `torch.save`, of any version.

    Returns:
        The container; the caller closes it.

    Raises:
        CheckpointError: the file is not there, is not a torch file, or is damaged.
    """
    if path.is_dir():
        raise _unreadable(path, "is a directory, not a checkpoint file", "directory", "name the .pt file inside it")
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer, reading a device would not end
        raise _unreadable(path, "is a pipe or a device, not a file", "not-a-file", _HINT)
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be opened: {error.strerror or error}; nothing was written",
            code="missing-file" if isinstance(error, FileNotFoundError) else "unreadable-file",
            key=path.name,
            hint="check the name and the permissions of the checkpoint",
        ) from None
    try:
        head = file.read(512)
        if not head:
            raise _unreadable(path, "is empty", "empty-file", "download or copy it again")
        with contextlib.ExitStack() as stack:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            stack.callback(data.close)
            if head[:4] == b"PK\x03\x04":
                container = _open_zip(path, file, data)
            elif head[:1] == b"\x80" and head[1:2] < b"\x06":
                container = _open_legacy(path, file, data)
            else:
                raise _foreign(path, head)
            stack.pop_all()
        return container
    except BaseException:
        file.close()
        raise


def _open_zip(path: Path, file: BinaryIO, data: mmap.mmap) -> Container:
    entries: dict[str, zipfile.ZipInfo] = {}
    if _directory_size(data) > _DIRECTORY:
        raise _unreadable(path, "has a larger zip directory than any trainer writes", "hostile-zip")
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename in entries:
                    raise _unreadable(path, f"holds the entry {info.filename!r} twice", "corrupted-zip")
                entries[info.filename] = info
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
        raise _unreadable(path, f"is a truncated or damaged zip file ({error})", "truncated") from None
    for name in entries:
        if ".." in name.split("/") or name.startswith("/") or "\\" in name:
            raise _unreadable(path, f"holds the entry {name!r}, which torch never writes", "hostile-zip")
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _unreadable(path, "is a zip file without torch's data.pkl", "foreign-file", _HINT)
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise _unreadable(path, "is a TorchScript program, not a checkpoint", "foreign-file", _HINT)
    if f"{prefix}byteorder" in entries:
        order = _range(path, data, entries[f"{prefix}byteorder"])
        if data[order.start : order.start + order.count] != b"little":
            raise _unreadable(path, "was written on a big-endian machine", "byteorder")
    where = _range(path, data, entries[pickles[0]])
    if where.count > _PICKLE:
        raise _unreadable(path, f"has a pickle of {where.count} bytes, larger than any trainer writes", "hostile-zip")
    _check_crc(path, data, where)
    loaded = load(data, where.start, path.name, where.start + where.count)
    folder = f"{prefix}data/"
    storages = {
        name.removeprefix(folder): _range(path, data, info) for name, info in entries.items() if name.startswith(folder)
    }
    behind = 0
    for place in sorted((where, *storages.values()), key=lambda place: (place.start, place.count)):
        if place.start < behind and place.count:  # a small file that pretends to be a large one
            raise _unreadable(path, f"entry {place.entry} overlaps another one", "hostile-zip")
        behind = max(behind, place.start + place.count)
    container = Container(path, "zip", file, data, loaded.value, loaded.globals, storages)
    for tensor in tensors_in(loaded.value, path.name):
        found = storages.get(tensor.storage.key)
        need = tensor.storage.count * container.dtype(tensor)[1]
        if found is None or found.count != need:
            have = "none" if found is None else str(found.count)
            raise _unreadable(path, f"storage {tensor.storage.key}: {need} bytes expected, {have} found", "truncated")
    return container


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


def _peek(data: mmap.mmap, at: int, count: int) -> bytes:
    """Read a few bytes; the kernel maps their whole neighbourhood, which is given back."""
    piece = data[at : at + count]
    release(data, at - _NEIGHBOURHOOD, 2 * _NEIGHBOURHOOD)
    return piece


def release(data: mmap.mmap, start: int, count: int) -> None:
    """Tell the kernel that a mapped range was used, so that it does not count as this process's memory."""
    page = mmap.PAGESIZE
    first = -(-max(start, 0) // page) * page
    last = min(start + count, len(data)) // page * page
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED, first, last - first)


def _range(path: Path, data: mmap.mmap, info: zipfile.ZipInfo) -> Range:
    """Find an entry's bytes: its local header may be longer than the directory says (torch pads it to align tensors)."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _unreadable(path, f"entry {info.filename} is compressed, which torch never does", "compressed-entry")
    at = info.header_offset
    header = _peek(data, at, 30)
    if at < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise _unreadable(path, f"entry {info.filename} has no header", "corrupted-zip")
    start = at + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > len(data):
        raise _unreadable(path, f"entry {info.filename} ends behind the file", "truncated")
    return Range(start, info.file_size, info.CRC, info.filename)


def _check_crc(path: Path, data: mmap.mmap, where: Range) -> None:
    import zlib

    if zlib.crc32(memoryview(data)[where.start : where.start + where.count]) != where.crc:
        raise corrupted(path, where)


def corrupted(path: Path, where: Range) -> CheckpointError:
    """Make the error for an entry whose bytes do not have the CRC-32 that the zip directory records."""
    return _unreadable(path, f"entry {where.entry} is damaged: its CRC-32 is wrong", "corrupted-entry")


def _open_legacy(path: Path, file: BinaryIO, data: mmap.mmap) -> Container:
    magic = load(data, 0, path.name)
    if magic.value != _LEGACY_MAGIC:
        raise _unreadable(path, "is a pickle that torch.save did not write", "foreign-file", _HINT)
    version = load(data, magic.end, path.name)
    described = load(data, version.end, path.name)
    system = described.value
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise _unreadable(path, "was written on a big-endian machine", "byteorder")
    loaded = load(data, described.end, path.name)
    listed = load(data, loaded.end, path.name)
    keys, at = listed.value, listed.end
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or not loaded.storages.keys() <= set(keys):
        raise _unreadable(path, "names storages that it does not hold", "corrupted-pickle")
    container = Container(path, "legacy", file, data, loaded.value, loaded.globals, {})
    for _ in tensors_in(loaded.value, path.name):  # refuses what nests too deep, here as in the zip layout
        pass
    for key in keys:
        count = int.from_bytes(_peek(data, at, 8), "little")
        if key not in loaded.storages:
            raise _unreadable(path, f"holds storage {key} that nothing refers to", "corrupted-pickle")
        kind, expected = loaded.storages[key]
        width = container.dtype_of(kind)[1]
        if count != expected or at + 8 + count * width > len(data):
            have = len(data) - at - 8
            raise _unreadable(path, f"storage {key}: {count * width} bytes expected, {have} are left", "truncated")
        container.storages[key] = Range(at + 8, count * width, None, key)
        at += 8 + count * width
    return container


def tensors_in(value: Any, name: str) -> Iterator[StoredTensor]:
    """Yield every tensor inside an unpickled value once, refusing structures no trainer would write."""
    seen: set[int] = set()
    pending: list[tuple[Any, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, StoredTensor):
            yield item
            continue
        if not isinstance(item, (dict, list, tuple, Stub)) or id(item) in seen:
            continue
        seen.add(id(item))
        if depth > _DEPTH or len(seen) > _NODES:
            raise CheckpointError(
                f"{name}: the pickle nests deeper than any trainer writes; nothing in it was executed",
                code="corrupted-pickle",
                key=name,
            )
        if isinstance(item, dict):
            pending += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, Stub):
            pending += [(item.args, depth + 1), (item.state, depth + 1), (item.items, depth + 1)]
        else:
            pending += [(child, depth + 1) for child in item]


_HINT = "name the checkpoint that fairseq's trainer wrote, such as checkpoint_best.pt"


def _unreadable(path: Path, what: str, code: str, hint: str = "download or copy the file again") -> CheckpointError:
    return CheckpointError(f"{path.name} {what}; nothing was written", code=code, key=path.name, hint=hint)


def _foreign(path: Path, head: bytes) -> CheckpointError:
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return _unreadable(path, "is a safetensors file, which needs no conversion", "foreign-file", _HINT)
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return _unreadable(path, "is a web page: the download failed", "foreign-file", "download it again")
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return _unreadable(path, "is a text file", "foreign-file", _HINT)
    return _unreadable(path, "is not a file that torch.save wrote", "foreign-file", _HINT)
