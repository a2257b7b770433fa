"""Move tensors from a checkpoint into safetensors files at the speed of a copy, each byte proved on the way.

Three threads overlap: one hashes the source file, one reads, checks (CRC-32, finite numbers) and writes, one reads what
was written back, compares it with what was meant, and hashes it. Memory is a few buffers, whatever the file's size.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.checkpoint.container import Container, Range, corrupted
from convert.checkpoint.unpickle import StoredTensor
from convert.errors import ConvertError, MismatchError, PlanError, Problem
from convert.mapping.rules import Edit, Plan, TensorSpec

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1 << 20
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_QUEUE = 8
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor to write: where its bytes come from and where they go.

    Args:
        spec: name, shape and dtype as written.
        source: the tensor in the checkpoint; `None` when a rule makes it.
        made: makes the bytes of a tensor that cannot be copied as it lies.
    """

    spec: TensorSpec
    source: StoredTensor | None
    made: Callable[[], bytes] | None

    @property
    def count(self) -> int:
        """The number of bytes written."""
        return WIDTHS[self.spec.dtype] * product(self.spec.shape)


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written and read back."""

    name: str
    size: int
    sha256: str


def sha256_of(data: mmap.mmap, progress: Progress | None = None, stop: threading.Event | None = None) -> str:
    """Hash a mapped file, in constant memory."""
    digest = hashlib.sha256()
    for at in range(0, len(data), CHUNK):
        if stop and stop.is_set():
            break
        with memoryview(data) as view, view[at : at + CHUNK] as piece:
            digest.update(piece)
        release(data, at, CHUNK)
        if progress:
            progress(min(CHUNK, len(data) - at))
    return digest.hexdigest()


def pieces(container: Container, plan: Plan, tensors: Mapping[str, StoredTensor], dtype: str) -> list[Piece]:
    """List the tensors to write, in the order of their bytes in the source, those that a rule makes last.

    Args:
        container: the mapped checkpoint.
        plan: a proved plan.
        tensors: where each source tensor is.
        dtype: `keep`, or the safetensors dtype of every floating point tensor.
    """
    edits: dict[str, list[Edit]] = {}
    for edit in plan.table.edits:
        edits.setdefault(edit.target, []).append(edit)
    listed = []
    for source, target in plan.renames.items():
        tensor, spec = tensors[source], plan.target[target]
        kind = spec.dtype if dtype == "keep" else dtype
        out = TensorSpec(target, spec.shape, kind)
        if _contiguous(tensor) and kind == spec.dtype and target not in edits:
            listed.append(Piece(out, tensor, None))
        else:
            listed.append(Piece(out, tensor, _maker(container, tensor, spec.dtype, kind, edits.get(target, []))))
    listed.sort(key=lambda piece: (piece.source is None, _start(container, piece.source), piece.spec.name))
    by_target = {target: source for source, target in plan.renames.items()}
    for fill in plan.fills:
        spec = plan.target[fill.target]
        kind = spec.dtype if dtype == "keep" else dtype
        listed.append(
            Piece(
                TensorSpec(fill.target, spec.shape, kind),
                None,
                _filler(container, fill.rule, spec.shape, kind, tensors, by_target),
            )
        )
    return sorted(listed, key=lambda piece: -WIDTHS[piece.spec.dtype])  # stable; keeps every tensor aligned


def split(listed: list[Piece], limit: int) -> list[list[Piece]]:
    """Split tensors into files of at most `limit` bytes each, as far as single tensors allow."""
    files: list[list[Piece]] = [[]]
    size = 0
    for piece in listed:
        if files[-1] and size + piece.count > limit:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.count
    return files


def header(listed: Iterable[Piece]) -> bytes:
    """Make a safetensors header: eight bytes of length, then JSON, padded so that the data starts aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in listed:
        entries[piece.spec.name] = {
            "dtype": piece.spec.dtype,
            "shape": list(piece.spec.shape),
            "data_offsets": [at, at + piece.count],
        }
        at += piece.count
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Transfer:
    """Writes files from one checkpoint while the checkpoint itself is hashed.

    Args:
        container: the mapped checkpoint.
        allow_non_finite: whether NaN and infinite weights are taken as they are.
        progress: called with the number of bytes that were finished, from several threads.
    """

    def __init__(
        self, container: Container, *, allow_non_finite: bool = False, progress: Progress | None = None
    ) -> None:
        self.container = container
        self.allow_non_finite = allow_non_finite
        self.progress = progress or (lambda count: None)
        self.stop = threading.Event()
        self.non_finite: list[Problem] = []
        self.checked: set[str] = set()
        self._source: list[str | BaseException] = []
        self._hasher = threading.Thread(target=self._hash_source, daemon=True)

    def __enter__(self) -> Transfer:
        self._hasher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._hasher.join()

    def _hash_source(self) -> None:
        try:
            self._source.append(sha256_of(self.container.data, self.progress, self.stop))
        except BaseException as error:  # noqa: BLE001 - handed to the caller of source_sha256
            self._source.append(error)

    def source_sha256(self) -> str:
        """Wait for the source file's SHA-256."""
        self._hasher.join()
        if isinstance(self._source[0], BaseException):
            raise self._source[0]
        return self._source[0]

    def write(self, path: Path, listed: list[Piece]) -> Written:
        """Write one safetensors file, read it back, and compare every byte.

        Args:
            path: the file to make; it must not exist.
            listed: its tensors, in order.

        Raises:
            CheckpointError: `corrupted-entry`, when a source entry's CRC-32 is wrong.
            MismatchError: `read-back`, when what was written is not what was read.
            PlanError: `non-finite`, every tensor that holds NaN or infinity.
            OSError: the disk is full, and the like.
        """
        head = header(listed)
        size = len(head) + sum(piece.count for piece in listed)
        with path.open("xb+", buffering=0) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                os.ftruncate(file.fileno(), size)
            prover = _Prover(file.fileno(), path.name, self.progress)
            prover.start()
            try:
                at = self._put(file.fileno(), prover, head, 0)
                for piece in listed:
                    for data in self._chunks(piece):
                        at = self._put(file.fileno(), prover, data, at)
            finally:
                digest = prover.finish()
            os.fsync(file.fileno())
        if self.non_finite and not self.allow_non_finite:
            raise PlanError(
                f"{len(self.non_finite)} tensors hold NaN or infinite numbers; nothing was written",
                code="non-finite",
                problems=self.non_finite,
                hint="training diverged: take an earlier checkpoint, or convert it as it is with --allow-non-finite",
            )
        return Written(path.name, size, digest)

    def _put(self, descriptor: int, prover: _Prover, data: Any, at: int) -> int:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], at + done)
        prover.add(at, view)
        return at + len(view)

    def _chunks(self, piece: Piece) -> Iterator[Any]:
        """Yield a tensor's bytes; raise when its source is damaged, and note it when its numbers are not finite."""
        whole: Range | None = None
        if piece.source is not None:
            where = self.container.storages[piece.source.storage.key]
            if piece.made is None and (_start(self.container, piece.source), piece.count) == (where.start, where.count):
                whole = where
            else:
                self._check(where)
        crc, finite = 0, True
        for data in tensor_bytes(self.container, piece):
            crc = zlib.crc32(data, crc) if whole else 0
            finite = finite and _is_finite(data, piece.spec.dtype)
            yield data
        if whole and whole.crc not in (None, crc):
            raise corrupted(self.container.path, whole)
        if not finite:
            self.non_finite.append(Problem("non-finite", piece.spec.name, "holds NaN or infinite numbers"))

    def _check(self, where: Range) -> None:
        if where.crc is not None and where.entry not in self.checked:
            crc = 0
            for at in range(where.start, where.start + where.count, CHUNK):
                crc = zlib.crc32(self.container.data[at : min(at + CHUNK, where.start + where.count)], crc)
            if crc != where.crc:
                raise corrupted(self.container.path, where)
            self.checked.add(where.entry)


class _Prover(threading.Thread):
    """Reads written bytes back, compares them with the ones that were meant, and hashes them."""

    def __init__(self, descriptor: int, name: str, progress: Progress) -> None:
        super().__init__(daemon=True)
        self.written = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self.name_of_file = name
        self.progress = progress
        self.queue: queue.Queue[tuple[int, memoryview] | None] = queue.Queue(_QUEUE)
        self.digest = hashlib.sha256()
        self.error: BaseException | None = None

    def add(self, at: int, view: memoryview) -> None:
        if self.error:
            raise self.error
        self.queue.put((at, view))

    def run(self) -> None:
        while (item := self.queue.get()) is not None:
            if self.error is None:
                try:
                    self._prove(*item)
                except BaseException as error:  # noqa: BLE001 - handed to the writer, which raises it
                    self.error = error

    def _prove(self, at: int, view: memoryview) -> None:
        count = len(view)
        with view, memoryview(self.written) as written, written[at : at + count] as back:
            if not _same(view, back):
                raise MismatchError(
                    f"{self.name_of_file}: bytes {at} to {at + count} read back differently from what was written; "
                    "nothing was kept",
                    code="read-back",
                    key=self.name_of_file,
                    hint="check the disk and the memory of this machine",
                )
            self.digest.update(back)
        release(self.written, at, count)
        self.progress(count)

    def finish(self) -> str:
        self.queue.put(None)
        self.join()
        self.written.close()
        if self.error:
            raise self.error
        return self.digest.hexdigest()


def tensor_bytes(container: Container, piece: Piece) -> Iterator[Any]:
    """Yield the bytes of a tensor as they are written, in chunks, mapped from the checkpoint where they can be."""
    if piece.source is None or piece.made is not None:
        yield piece.made() if piece.made else b""
        return
    start = _start(container, piece.source)
    for at in range(start, start + piece.count, CHUNK):
        yield memoryview(container.data)[at : min(at + CHUNK, start + piece.count)]
        release(container.data, max(0, at - 2 * _QUEUE * CHUNK), CHUNK)  # tensors come in the file's order


def _same(a: memoryview, b: memoryview) -> bool:
    """Compare two pieces of equal length; as words, because comparing memoryviews goes byte by byte."""
    import numpy as np

    words = len(a) // 8 * 8
    equal = np.array_equal(np.frombuffer(a[:words], np.uint64), np.frombuffer(b[:words], np.uint64))
    return bool(equal) and bytes(a[words:]) == bytes(b[words:])


def product(shape: Iterable[int]) -> int:
    """Multiply the lengths of a shape: the number of its elements."""
    count = 1
    for length in shape:
        count *= length
    return count


def _contiguous(tensor: StoredTensor) -> bool:
    expected = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if length != 1 and stride != expected:
            return 0 in tensor.shape
        expected *= length
    return True


def _start(container: Container, tensor: StoredTensor | None) -> int:
    if tensor is None:
        return 0
    return container.storages[tensor.storage.key].start + tensor.offset * container.dtype(tensor)[1]


def _is_finite(data: Any, dtype: str) -> bool:
    import numpy as np

    if dtype == "BF16":
        return not bool(((np.frombuffer(data, np.uint16) & 0x7F80) == 0x7F80).any())
    kind = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(dtype)
    return kind is None or bool(np.isfinite(np.frombuffer(data, kind)).all())


def read_array(container: Container, tensor: StoredTensor) -> np.ndarray[Any, Any]:
    """Copy a tensor's numbers, whatever its strides, into a new array; bfloat16 comes as its raw `uint16`."""
    import numpy as np

    name, width = container.dtype(tensor)
    kinds: dict[str, Any] = {
        "F32": np.float32,
        "F16": np.float16,
        "F64": np.float64,
        "BF16": np.uint16,
        "I64": np.int64,
    }
    kinds |= {"I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, kinds[name])
    start = _start(container, tensor)
    span = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=True)) + 1
    flat = np.frombuffer(container.data[start : start + span * width], kinds[name])
    strides = [step * width for step in tensor.stride]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False))


def cast(array: np.ndarray[Any, Any], source: str, target: str) -> bytes:
    """Round numbers to another floating point type, to nearest, ties to even, as torch does.

    Args:
        array: the numbers; bfloat16 as raw `uint16`.
        source, target: safetensors dtypes.
    """
    import numpy as np

    if source == target:
        return array.tobytes()
    wide = (array.astype(np.uint32) << 16).view(np.float32) if source == "BF16" else array
    if target != "BF16":
        with np.errstate(over="ignore"):  # too large for the type: becomes infinite, which the finite check reports
            return wide.astype({"F32": np.float32, "F16": np.float16, "F64": np.float64}[target]).tobytes()
    bits = np.ascontiguousarray(wide.astype(np.float32)).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded).astype(np.uint16).tobytes()


def _maker(
    container: Container, tensor: StoredTensor, source: str, target: str, edits: list[Edit]
) -> Callable[[], bytes]:
    def make() -> bytes:
        array = read_array(container, tensor)
        for edit in edits:
            if edit.rule == "add":
                array[edit.row] += array.dtype.type(edit.value)
            else:
                array[edit.row] = array.dtype.type(edit.value)
        return cast(array, source, target)

    return make


def _filler(
    container: Container,
    rule: str,
    shape: tuple[int, ...],
    dtype: str,
    tensors: Mapping[str, StoredTensor],
    by_target: Mapping[str, str],
) -> Callable[[], bytes]:
    def make() -> bytes:
        import numpy as np

        if rule == "zeros":
            return cast(np.zeros(shape, np.float32), "F32", dtype)
        if rule == "identity":
            return cast(np.eye(*shape, dtype=np.float32), "F32", dtype)
        if rule.startswith("norm of "):
            tensor = tensors[by_target[rule.removeprefix("norm of ")]]
            array = read_array(container, tensor)
            name = container.dtype(tensor)[0]
            if name == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            norm = np.sqrt((array.astype(np.float64) ** 2).sum(axis=tuple(range(array.ndim - 1))))
            return cast(norm.astype(np.float32).reshape(shape), "F32", dtype)
        raise ConvertError(f"no such rule: {rule}", code="rule", key=rule)

    return make


def release(data: mmap.mmap, start: int, count: int) -> None:
    """Tell the kernel that a mapped range was used, so that it does not count as this process's memory."""
    page = mmap.PAGESIZE
    first = -(-start // page) * page
    last = (start + count) // page * page
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED, first, last - first)
