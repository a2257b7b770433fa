"""Find the bytes of a torch file's storages, in the zip layout and in the layout before torch 1.6, without reading them."""

from __future__ import annotations

import contextlib
import mmap
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_DEPTH, _NODES = 200, 4_000_000


@dataclass(frozen=True, slots=True)
class Range:
    """Where a storage's bytes are.

    Args:
        start: the first byte in the file.
        count: the number of bytes.
        crc: the CRC-32 that the zip directory records; `None` in the legacy layout, which has none.
        entry: the zip entry's name, or the storage's key.
    """

    start: int
    count: int
    crc: int | None
    entry: str


@dataclass(slots=True)
class Container:
    """An opened torch file: its unpickled index and the byte ranges of its storages; close it after use.

    Args:
        path: the file.
        kind: `zip` or `legacy`.
        data: the mapped file.
        value: the unpickled object, tensors as `StoredTensor`.
        globals: every global that the pickle names.
        storages: the byte range of every storage, by key.
    """

    path: Path
    kind: str
    data: mmap.mmap
    value: Any
    globals: frozenset[Global]
    storages: dict[str, Range]

    def close(self) -> None:
        """Unmap the file."""
        with contextlib.suppress(BufferError):  # an error's traceback may still hold a view; it is unmapped with it
            self.data.close()

    def dtype(self, tensor: StoredTensor) -> tuple[str, int]:
        """Return a tensor's safetensors dtype and its bytes an element."""
        known = DTYPES.get(tensor.storage.type)
        if known is None:
            raise CheckpointError(
                f"{self.path.name}: storage type {tensor.storage.type} is not supported; nothing was written",
                code="unsupported-dtype",
                key=tensor.storage.type,
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
    with path.open("rb") as file:
        head = file.read(512)
        if not head:
            raise _unreadable(path, "is empty", "empty-file", "download or copy it again")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        if head[:4] == b"PK\x03\x04":
            return _open_zip(path, data)
        if head[:1] == b"\x80" and head[1] < 6:
            return _open_legacy(path, data)
        raise _foreign(path, head)
    except BaseException:
        data.close()
        raise


def _open_zip(path: Path, data: mmap.mmap) -> Container:
    entries: dict[str, zipfile.ZipInfo] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename in entries:
                    raise _unreadable(path, f"holds the entry {info.filename!r} twice", "corrupted-zip")
                entries[info.filename] = info
    except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeDecodeError, OSError) as error:
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
    _check_crc(path, data, where)
    value, names, _ = load(data[where.start : where.start + where.count], 0, path.name)
    folder = f"{prefix}data/"
    storages = {
        name.removeprefix(folder): _range(path, data, info) for name, info in entries.items() if name.startswith(folder)
    }
    container = Container(path, "zip", data, value, frozenset(names), storages)
    for tensor in tensors_in(value, path.name):
        found = storages.get(tensor.storage.key)
        need = tensor.storage.count * container.dtype(tensor)[1]
        if found is None or found.count != need:
            have = "none" if found is None else str(found.count)
            raise _unreadable(path, f"storage {tensor.storage.key}: {need} bytes expected, {have} found", "truncated")
    return container


def _range(path: Path, data: mmap.mmap, info: zipfile.ZipInfo) -> Range:
    """Find an entry's bytes: its local header may be longer than the directory says (torch pads it to align tensors)."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _unreadable(path, f"entry {info.filename} is compressed, which torch never does", "compressed-entry")
    at = info.header_offset
    header = data[at : at + 30]
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
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


def _open_legacy(path: Path, data: mmap.mmap) -> Container:
    magic, _, at = load(data, 0, path.name)
    if magic != _LEGACY_MAGIC:
        raise _unreadable(path, "is a pickle that torch.save did not write", "foreign-file", _HINT)
    _, _, at = load(data, at, path.name)  # protocol version
    system, _, at = load(data, at, path.name)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise _unreadable(path, "was written on a big-endian machine", "byteorder")
    value, names, at = load(data, at, path.name)
    keys, _, at = load(data, at, path.name)
    needed = {tensor.storage.key: tensor for tensor in tensors_in(value, path.name)}
    if not isinstance(keys, list) or set(map(str, keys)) < set(needed):
        raise _unreadable(path, "names storages that it does not hold", "corrupted-pickle")
    container = Container(path, "legacy", data, value, frozenset(names), {})
    for key in map(str, keys):
        count = int.from_bytes(data[at : at + 8], "little")
        if key not in needed:
            raise _unreadable(path, f"holds storage {key} that nothing refers to", "corrupted-pickle")
        width = container.dtype(needed[key])[1]
        if count != needed[key].storage.count or at + 8 + count * width > len(data):
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
