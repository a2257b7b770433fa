"""An opened file of tensors: what it holds as plain data, and where the bytes of its storages lie."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from convert.checkpoint.stored import Global, StoredTensor, Stub
from convert.errors import CheckpointError
from convert.files import WIDTHS, sha256_of, stamp

# torch storage class -> safetensors dtype
DTYPES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# bytes an element of storages that no conversion takes, and that other programs leave beside a model
_WIDTHS = {
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
}
_WIDTHS |= {name: WIDTHS[dtype] for name, dtype in DTYPES.items()} | {"UntypedStorage": 1}
_NEIGHBOURHOOD, _CHUNK = 1 << 21, 1 << 20
_DEPTH, _NODES = 200, 4_000_000


@dataclass(frozen=True, slots=True)
class Range:
    """Where a storage's bytes are.

    Args:
        start: the first byte in the file.
        count: the number of bytes.
        crc: the CRC-32 that the zip directory records; `None` in the other layouts, which have none.
        entry: the zip entry's name, or the storage's key.
        file: which of the container's files holds them.
    """

    start: int
    count: int
    crc: int | None
    entry: str
    file: int = 0


@dataclass(slots=True)
class Opened:
    """A file that is open, and mapped.

    Args:
        file: the file; its `name` is its path.
        data: the same, mapped.
        path: where it is.
        stamp: what changes with its content: device, inode, size, and the times of its content and of its entry.
    """

    file: BinaryIO
    data: mmap.mmap
    path: Path = field(init=False)
    stamp: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.path = Path(self.file.name).absolute()
        self.stamp = stamp(os.fstat(self.file.fileno()))

    @property
    def changed(self) -> bool:
        """Whether the file was written to since, or its name leads to another one."""
        try:
            return not self.stamp == stamp(os.fstat(self.file.fileno())) == stamp(self.path.stat())
        except OSError:
            return True

    def close(self) -> None:
        """Close it."""
        self.file.close()
        with contextlib.suppress(BufferError):  # an error's traceback may still hold a view; it is unmapped with it
            self.data.close()


@dataclass(slots=True)
class Container:
    """A file of tensors: its index, and the byte ranges of its storages; close it after use.

    Args:
        path: the file.
        kind: `zip`, `legacy` or `safetensors`.
        original: the file itself, as it was opened.
        value: the unpickled object, tensors as `StoredTensor`.
        globals: every global that the pickle names.
        storages: the byte range of every storage, by key, in `file`.
        unpack: makes the file that `storages` are in, where they are compressed; it is called when a byte is asked for.
        unpacked: how many bytes that file has; those of the file itself, where nothing is compressed.
        others: the further files of a checkpoint that lies in several; `storages` then are those of all.
    """

    path: Path
    kind: str
    original: Opened
    value: Any
    globals: frozenset[Global]
    storages: Mapping[str, Range]
    unpack: Callable[[], Opened] | None = None
    unpacked: int = 0
    others: tuple[Container, ...] = ()
    _place: Opened | None = None

    @property
    def files(self) -> tuple[Container, ...]:
        """Every file of the checkpoint, in order."""
        return (self, *self.others)

    @property
    def file(self) -> BinaryIO:
        """The file that the storages are in, for reading in bulk; its `name` is its path."""
        return self.place.file

    @property
    def data(self) -> mmap.mmap:
        """The file that the storages are in, mapped."""
        return self.place.data

    @property
    def size(self) -> int:
        """The size of all files in bytes, as they are."""
        return sum(len(one.original.data) for one in self.files)

    @property
    def place(self) -> Opened:
        """The file that the storages are in, as it was opened."""
        if self._place is None:
            self._place = self.original if self.unpack is None else self.unpack()
        return self._place

    def sha256(self, progress: Callable[[int], None] = lambda count: None) -> str:
        """Hash the file; of several, what `sha256sum` prints of them.

        Args:
            progress: called with numbers of bytes that were hashed; what it raises ends the work.
        """
        digests = [sha256_of(one.original.file, lambda piece: progress(len(piece))) for one in self.files]
        if len(digests) == 1:
            return digests[0]
        lines = [f"{digest}  {one.path.name}\n" for digest, one in zip(digests, self.files, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def close(self) -> None:
        """Close the files, and remove what was unpacked."""
        for one in self.files:
            one.original.close()
            if one._place is not None:
                one._place.close()

    def check_bytes(self, tensors: Iterable[StoredTensor]) -> None:
        """Hold the storages of tensors against the CRC-32 that a zip directory records; other layouts record none.

        Raises:
            CheckpointError: `corrupted-entry`.
        """
        for key in sorted({part.storage.key for tensor in tensors for part in tensor.parts}):
            where = self.storages[key]
            if where.crc is not None:
                check_crc(self.files[where.file].path, self.files[where.file].data, where)

    def check_unchanged(self) -> None:
        """Refuse what was done with the checkpoint if one of its files changed meanwhile.

        Raises:
            CheckpointError: `changed`.
        """
        for one in self.files:
            if one.original.changed:
                raise CheckpointError(
                    f"{one.path.name} changed while it was read; nothing was written",
                    code="changed",
                    key=one.path.name,
                    hint="run the command again once nothing writes to the file any more",
                )

    def dtype(self, tensor: StoredTensor) -> tuple[str, int]:
        """Return a tensor's safetensors dtype and its bytes an element."""
        known = DTYPES.get(tensor.storage.type)
        if known is None:
            raise self._unsupported(tensor.storage.type)
        return known, WIDTHS[known]

    def width_of(self, storage: str) -> int:
        """Return the bytes an element of a storage class of torch's, of those too that no conversion takes."""
        if storage not in _WIDTHS:
            raise self._unsupported(storage)
        return _WIDTHS[storage]

    def _unsupported(self, storage: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name}: storage type {storage} is not supported; nothing was written",
            code="unsupported-dtype",
            key=storage,
        )


def peek(data: mmap.mmap, at: int, count: int) -> bytes:
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


def check_crc(path: Path, data: mmap.mmap, where: Range) -> None:
    """Hold bytes against the CRC-32 that a zip directory records.

    Raises:
        CheckpointError: `corrupted-entry`.
    """
    crc = 0
    for at in range(where.start, where.start + where.count, _CHUNK):
        count = min(_CHUNK, where.start + where.count - at)
        with memoryview(data) as view, view[at : at + count] as piece:
            crc = zlib.crc32(piece, crc)
        release(data, at, count)
    if crc != where.crc:
        raise corrupted(path, where)


def tensors_in(value: object, name: str) -> Iterator[StoredTensor]:
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


def corrupted(path: Path, where: Range) -> CheckpointError:
    """Make the error for an entry whose bytes do not have the CRC-32 that the zip directory records."""
    return unreadable(path, f"entry {where.entry} is damaged: its CRC-32 is wrong", "corrupted-entry")


def unreadable(path: Path, what: str, code: str, hint: str = "download or copy the file again") -> CheckpointError:
    """Make the error for a file that cannot be read: what it is, and what to do."""
    return CheckpointError(f"{path.name} {what}; nothing was written", code=code, key=path.name, hint=hint)
