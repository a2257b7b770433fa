"""Open a file of tensors, by what its first bytes say: torch's zip layout, torch's before 1.6, or safetensors."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

from convert.checkpoint.container import DTYPES, Container, Opened, Range, peek, tensors_in, unreadable
from convert.checkpoint.foreign import directory, file
from convert.checkpoint.unpickle import Storage, StoredTensor, load
from convert.checkpoint.zip_layout import open_zip

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_STORAGES = {dtype: (storage, width) for storage, (dtype, width) in DTYPES.items()}
_HEADER = 100_000_000  # bytes: the limit of the safetensors library


def open_container(path: Path) -> Container:
    """Open a file of tensors and read its index; no tensor byte is read.

    Args:
        path: a file written by `torch.save`, of any version, or by safetensors.

    Returns:
        The container; the caller closes it.

    Raises:
        CheckpointError: the file is not there, is something else, or is damaged.
    """
    if path.is_dir():
        raise directory(path)
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer, reading a device would not end
        raise unreadable(path, "is a pipe or a device, not a file", "not-a-file", "name a file")
    try:
        opened = path.open("rb")
    except OSError as error:
        raise unreadable(
            path,
            f"cannot be opened: {error.strerror or error}",
            "missing-file" if isinstance(error, FileNotFoundError) else "unreadable-file",
            "check the name and the permissions of the checkpoint",
        ) from None
    try:
        head = opened.read(512)
        if not head:
            raise unreadable(path, "is empty", "empty-file", "download or copy it again")
        original = Opened(opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    except BaseException:
        opened.close()
        raise
    try:
        if head[:4] == b"PK\x03\x04":
            return open_zip(path, original)
        if head[:1] == b"\x80" and head[1:2] < b"\x06":
            return _open_legacy(path, original)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= min(_HEADER, len(original.data) - 8):
            return _open_safetensors(path, original)
        raise file(path, head)
    except BaseException:
        original.close()
        raise


def _open_legacy(path: Path, original: Opened) -> Container:
    data = original.data
    magic = load(data, 0, path.name)
    if magic.value != _LEGACY_MAGIC:
        raise file(path, data[:512], index=bool(magic.storages))
    version = load(data, magic.end, path.name)
    described = load(data, version.end, path.name)
    system = described.value
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise unreadable(path, "was written on a big-endian machine", "byteorder")
    loaded = load(data, described.end, path.name)
    listed = load(data, loaded.end, path.name)
    keys, at = listed.value, listed.end
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or not loaded.storages.keys() <= set(keys):
        raise unreadable(path, "names storages that it does not hold", "corrupted-pickle")
    container = Container(path, "legacy", original, loaded.value, loaded.globals, {}, unpacked=len(data))
    for _ in tensors_in(loaded.value, path.name):  # refuses what nests too deep, here as in the zip layout
        pass
    for key in keys:
        count = int.from_bytes(peek(data, at, 8), "little")
        if key not in loaded.storages:
            raise unreadable(path, f"holds storage {key} that nothing refers to", "corrupted-pickle")
        kind, expected = loaded.storages[key]
        width = container.width_of(kind)
        if count != expected or at + 8 + count * width > len(data):
            have = len(data) - at - 8
            raise unreadable(path, f"storage {key}: {count * width} bytes expected, {have} are left", "truncated")
        container.storages[key] = Range(at + 8, count * width, None, key)
        at += 8 + count * width
    return container


def _open_safetensors(path: Path, original: Opened) -> Container:
    """Read a safetensors header; its tensors become a dict of contiguous views, each on a storage of its own."""
    count = int.from_bytes(original.data[:8], "little")
    room, behind = len(original.data) - 8 - count, 0
    tensors: dict[str, StoredTensor] = {}
    storages: dict[str, Range] = {}
    try:
        entries = json.loads(original.data[8 : 8 + count], object_pairs_hook=_once)
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            storage, width = _STORAGES[entry["dtype"]]
            shape, stride, elements = tuple(entry["shape"]), [], 1
            if len(shape) > 64 or not all(type(length) is int and 0 <= length < 2**62 for length in (*shape, first)):
                raise ValueError(f"{name} has no shape")
            for length in reversed(shape):
                stride.append(elements)
                elements *= length
            if not behind <= first <= last <= room or last - first != elements * width:
                raise ValueError(f"{name} leaves its place")
            behind = last
            tensors[name] = StoredTensor(Storage(name, storage, elements), 0, shape, tuple(reversed(stride)))
            storages[name] = Range(8 + count + first, last - first, None, name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = f"is a damaged or truncated safetensors file ({type(error).__name__}: {str(error)[:80]})"
        raise unreadable(path, detail, "truncated") from None
    return Container(path, "safetensors", original, tensors, frozenset(), storages, unpacked=len(original.data))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found
