"""Open a file of tensors, by what its first bytes say: torch's zip layout, torch's before 1.6, or safetensors."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

from convert.checkpoint.container import DTYPES, Container, Opened, Range, peek, tensors_in, unreadable
from convert.checkpoint.foreign import directory, file
from convert.checkpoint.stored import Storage, StoredTensor
from convert.checkpoint.unpickle import load
from convert.checkpoint.zip_layout import open_zip
from convert.errors import ConvertError
from convert.files import read_header
from convert.reading import open_file

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_STORAGES = {dtype: storage for storage, dtype in DTYPES.items()}


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
    try:
        opened = open_file(path)
    except OSError as error:
        raise unreadable(
            path,
            f"cannot be opened: {error.strerror or error}",
            "missing-file" if isinstance(error, FileNotFoundError) else "unreadable-file",
            "check the name and the permissions of the checkpoint",
        ) from None
    except ConvertError:
        raise unreadable(path, "is a pipe or a device, not a file", "not-a-file", "name a file") from None
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
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= len(original.data) - 8:
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
    storages: dict[str, Range] = {}
    container = Container(path, "legacy", original, loaded.value, loaded.globals, storages, unpacked=len(data))
    for _ in tensors_in(loaded.value, path.name):  # refuses what nests too deep, here as in the zip layout
        pass
    for key in keys:
        count = int.from_bytes(peek(data, at, 8), "little")
        if key not in loaded.storages:
            raise unreadable(path, f"holds storage {key} that nothing refers to", "corrupted-pickle")
        storage = loaded.storages[key]
        width = container.width_of(storage.type)
        if count != storage.count or at + 8 + count * width > len(data):
            have = len(data) - at - 8
            raise unreadable(path, f"storage {key}: {count * width} bytes expected, {have} are left", "truncated")
        storages[key] = Range(at + 8, count * width, None, key)
        at += 8 + count * width
    return container


def _open_safetensors(path: Path, original: Opened) -> Container:
    """Read a safetensors header; its tensors become a dict of contiguous views, each on a storage of its own."""
    try:
        stored, _ = read_header(original.file)
    except ValueError as error:
        detail = f"is a damaged or truncated safetensors file ({str(error)[:80]})"
        raise unreadable(path, detail, "truncated") from None
    tensors: dict[str, StoredTensor] = {}
    storages: dict[str, Range] = {}
    for name, one in stored.items():
        stride = [math.prod(one.shape[axis + 1 :]) for axis in range(len(one.shape))]
        storage = Storage(name, _STORAGES[one.dtype], math.prod(one.shape))
        tensors[name] = StoredTensor(storage, 0, one.shape, tuple(stride))
        storages[name] = Range(one.start, one.count, None, name)
    return Container(path, "safetensors", original, tensors, frozenset(), storages, unpacked=len(original.data))
