"""Move tensors from a checkpoint into safetensors files at the speed of a copy, each byte proved on the way.

Three threads overlap: one hashes the source file, one reads, checks (CRC-32, finite numbers) and writes, one reads what
was written back, compares it with what was meant, and hashes it. Memory is a few buffers, whatever the file's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from convert.checkpoint.container import Container, Range, corrupted, release
from convert.checkpoint.stored import StoredTensor
from convert.errors import CheckpointError, ConvertError, MismatchError, PlanError, Problem
from convert.files import PIECE as CHUNK
from convert.files import WIDTHS, create, header_bytes
from convert.rules import FLOATS, Add, Edit, Identity, Plan, Sinusoids, TensorSpec, What, Zeros

if TYPE_CHECKING:
    import numpy as np

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
        return WIDTHS[self.spec.dtype] * math.prod(self.spec.shape)


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written and read back."""

    name: str
    size: int
    sha256: str


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
        tensor, spec = without_rows(tensors[source], plan.table.skips.get(target, 0)), plan.target[target]
        kind = spec.dtype if dtype == "keep" or spec.dtype not in FLOATS else dtype
        out = TensorSpec(target, spec.shape, kind)
        if tensor.is_contiguous and kind == spec.dtype and target not in edits:
            listed.append(Piece(out, tensor, None))
        else:
            listed.append(Piece(out, tensor, _maker(container, tensor, spec.dtype, kind, edits.get(target, []))))
    listed.sort(key=lambda piece: (_start(container, piece.source) if piece.source else (0, 0), piece.spec.name))
    by_target = {target: source for source, target in plan.renames.items()}
    for fill in plan.fills:
        spec = plan.target[fill.target]
        kind = spec.dtype if dtype == "keep" else dtype
        listed.append(
            Piece(
                TensorSpec(fill.target, spec.shape, kind),
                None,
                _filler(container, fill.what, spec.shape, kind, tensors, by_target),
            )
        )
    return sorted(listed, key=lambda piece: -WIDTHS[piece.spec.dtype])  # stable; keeps every tensor aligned


def not_repeated(container: Container, plan: Plan, tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    """Compare the tensors that a plan drops as repetitions with what they should repeat, byte for byte.

    Args:
        container: the mapped checkpoint.
        plan: a proved plan.
        tensors: where each source tensor is.
    """
    return [
        Problem(
            "not-repeated", drop.source, f"is not what {drop.repeats} is, and one of them has a place: {drop.reason}"
        )
        for drop in plan.drops
        if drop.repeats
        and read_array(container, tensors[drop.source]).tobytes()
        != read_array(container, tensors[drop.repeats]).tobytes()
    ]


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


class Transfer:
    """Writes files from one checkpoint while the checkpoint itself is hashed.

    The calling thread hashes the source on its way through it and writes; a second thread checks, reads back, compares
    and hashes what was written. Each byte of the source is in both cores' caches once.

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
        self.source = hashlib.sha256()
        self.hashed = 0
        self.checked: set[tuple[int, str]] = set()
        self.free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()  # buffers go from here to the prover and back
        for _ in range(_QUEUE + 2):
            self.free.put(bytearray(CHUNK))
        self.scratch = bytearray(CHUNK)
        self.stopped = False
        self.ahead: ThreadPoolExecutor | None = None
        self.rest: Future[Any] | None = None

    def _read(self, file: BinaryIO, at: int, view: memoryview) -> None:
        """Fill a buffer from a file; reading beats touching a mapping, page by page."""
        done = 0
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done:]], at + done)
            if count == 0:
                name = Path(file.name).name
                raise CheckpointError(f"{name} became shorter while it was read", code="truncated", key=name)
            done += count

    def _hash(self, at: int, view: memoryview) -> None:
        """Hash a piece of the source, after all that stands before it; what was hashed already is passed over."""
        # of several files, and of what was unpacked, these are not the bytes that are hashed next
        if self.rest is not None or self.container.others or self.container.unpack is not None:
            return
        self._hash_to(at)
        if at == self.hashed:
            self.source.update(view)
            self.hashed += len(view)
            self.progress(len(view))

    def _hash_to(self, end: int) -> None:
        while self.hashed < end and not self.stopped:
            view = memoryview(self.scratch)[: end - self.hashed]
            self._read(self.container.original.file, self.hashed, view)
            self.source.update(view)
            self.hashed += len(view)
            self.progress(len(view))

    def source_sha256(self) -> str:
        """Hash the rest of the source file, and return its SHA-256; the last call. Of several files, see `Container.sha256`."""
        try:
            if self.container.others:
                return self.container.sha256() if self.rest is None else str(self.rest.result())
            if self.rest is None:
                self._hash_to(self.container.size)
            else:
                self.rest.result()
        finally:
            self._stop()
        return self.source.hexdigest()

    def _stop(self) -> None:
        """End the hashing thread before the file that it reads is closed; an error that it met holds this object."""
        self.stopped = True
        if self.ahead is not None:
            self.ahead.shutdown()
        self.ahead = self.rest = None

    def _hash_alone(self, size: int) -> None:
        """Where much training state stands beside the model, hashing is the longer part: it gets a thread of its own.

        So does the hashing of several files, whose tensors are not read in the files' order.
        """
        several = bool(self.container.others)
        if self.rest is None and (several or self.container.size - self.hashed > 2 * size):
            self.ahead = ThreadPoolExecutor(1)
            with _starting():
                if several:
                    self.rest = self.ahead.submit(self.container.sha256, self._used)
                else:
                    self.rest = self.ahead.submit(self._hash_to, self.container.size)

    def _used(self, count: int) -> None:
        if self.stopped:
            raise InterruptedError
        self.progress(count)

    def write(self, path: Path, listed: list[Piece]) -> Written:
        """Write one safetensors file, read it back, and compare every byte.

        Args:
            path: the file to make; it must not exist.
            listed: its tensors, in order.

        Raises:
            CheckpointError: `corrupted-entry`, when a source entry's CRC-32 is wrong.
            MismatchError: `read-back`, when what was written is not what was read.
            PlanError: `non-finite`, every tensor that holds NaN or infinity.
            ConvertError: `threads`, when the system gives no thread.
            OSError: the disk is full, and the like.
        """
        try:
            head = header_bytes((piece.spec.name, piece.spec.dtype, piece.spec.shape) for piece in listed)
            size = len(head) + sum(piece.count for piece in listed)
            with create(path) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    os.ftruncate(file.fileno(), size)
                with _Prover(file.fileno(), path.name, self.container, self.progress, self.free) as prover:
                    self._hash_alone(size)
                    at = self._put(prover, _Chunk(0, memoryview(head)))
                    for piece in listed:
                        for chunk in self._chunks(piece, at):
                            at = self._put(prover, chunk)
            if prover.non_finite and not self.allow_non_finite:
                raise PlanError(
                    f"{self.container.path.name} holds NaN or infinite numbers; nothing was written",
                    code="non-finite",
                    problems=prover.non_finite,
                    hint="training diverged: take an earlier checkpoint, or convert it as it is with --allow-non-finite",
                )
        except BaseException:
            self._stop()
            raise
        return Written(path.name, size, prover.digest.hexdigest())

    def _put(self, prover: _Prover, chunk: _Chunk) -> int:
        done = 0
        while done < len(chunk.view):
            done += os.pwrite(prover.descriptor, chunk.view[done:], chunk.at + done)
        end = chunk.at + len(chunk.view)  # the prover gives the view back
        prover.add(chunk)
        return end

    def _chunks(self, piece: Piece, at: int) -> Iterator[_Chunk]:
        """Yield a tensor's bytes: read, and hashed on the way, where they lie as they are written."""
        parts = piece.source.parts if piece.source is not None else ()
        wholes = [self._whole(part, piece) for part in parts]
        if piece.source is None or piece.made is not None:
            for data in tensor_bytes(self.container, piece):
                yield _Chunk(at, memoryview(data).cast("B") if len(data) else memoryview(b""), piece)
                at += len(data)
            return
        for part, whole in zip(parts, wholes, strict=True):
            if whole is None:
                for data in _part_bytes(self.container, part):
                    yield _Chunk(at, data, piece)
                    at += len(data)
                continue
            for start in range(whole.start, whole.start + whole.count, CHUNK):
                buffer = self.free.get()
                view = memoryview(buffer)[: whole.start + whole.count - start]
                self._read(self.container.files[whole.file].file, start, view)
                self._hash(start, view)
                yield _Chunk(at, view, piece, whole, buffer)
                at += min(CHUNK, whole.start + whole.count - start)

    def _whole(self, part: StoredTensor, piece: Piece) -> Range | None:
        """Return a tensor's storage where the tensor is all of it, so that its CRC-32 is checked on the way.

        A storage that is only used in part, or not as it lies, is checked here.
        """
        where = self.container.storages[part.storage.key]
        if piece.made is None and _range_of(self.container, part) == (where.start, where.count):
            return where
        if where.crc is not None and (where.file, where.entry) not in self.checked:
            crc, source = 0, self.container.files[where.file]
            for at in range(where.start, where.start + where.count, CHUNK):
                crc = zlib.crc32(source.data[at : min(at + CHUNK, where.start + where.count)], crc)
            if crc != where.crc:
                raise corrupted(source.path, where)
            self.checked.add((where.file, where.entry))
        return None


@dataclass(frozen=True, slots=True)
class _Chunk:
    at: int
    view: memoryview
    piece: Piece | None = None
    whole: Range | None = None
    buffer: bytearray | None = None


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Refuse clearly where the system gives no thread: it has too many, or no memory for another one's stack."""
    try:
        yield
    except RuntimeError as error:
        raise ConvertError(
            f"{error}; nothing was written",
            code="threads",
            hint="raise the limits on threads and memory (ulimit -u, ulimit -v)",
        ) from None


class _Prover(threading.Thread):
    """Checks what is written, reads it back, compares it with what was meant, and hashes it.

    The thread lives for the length of a `with` statement, however that ends; the writer's error goes before its own.
    """

    def __init__(
        self, descriptor: int, name: str, source: Container, progress: Progress, free: queue.SimpleQueue[bytearray]
    ) -> None:
        super().__init__(daemon=True)
        self.descriptor = descriptor
        self.free = free
        self.back = bytearray(CHUNK)
        self.name_of_file = name
        self.source = source
        self.progress = progress
        self.queue: queue.Queue[_Chunk | None] = queue.Queue(_QUEUE)
        self.digest = hashlib.sha256()
        self.error: BaseException | None = None
        self.non_finite: list[Problem] = []
        self._crc, self._left = 0, 0  # the CRC-32 of the storage in hand so far, the bytes left of it

    def __enter__(self) -> _Prover:
        with _starting():
            self.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.queue.put(None)
        self.join()
        found, self.error = self.error, None  # its traceback holds this thread: not a cycle, or the buffers stay
        try:
            if found is not None and error is None:
                raise found
        finally:
            del found

    def add(self, chunk: _Chunk) -> None:
        if self.error:
            raise self.error
        self.queue.put(chunk)

    def run(self) -> None:
        while (chunk := self.queue.get()) is not None:
            if self.error is None:
                try:
                    self._check(chunk)
                    self._prove(chunk)
                except BaseException as error:  # noqa: BLE001 - handed to the writer, which raises it
                    self.error = error
            chunk.view.release()
            if chunk.buffer is not None:
                self.free.put(chunk.buffer)

    def _check(self, chunk: _Chunk) -> None:
        """Compare a storage's CRC-32 with the zip directory's after its last byte, and look for NaN and infinity."""
        if chunk.piece is None:
            return
        name = chunk.piece.spec.name
        if not _is_finite(chunk.view, chunk.piece.spec.dtype):
            self.non_finite.append(Problem("non-finite", name, "holds NaN or infinite numbers"))
        if chunk.whole is not None and chunk.whole.crc is not None:
            if self._left == 0:
                self._crc, self._left = 0, chunk.whole.count
            self._crc = zlib.crc32(chunk.view, self._crc)
            self._left -= len(chunk.view)
            if self._left == 0 and self._crc != chunk.whole.crc:
                raise corrupted(self.source.files[chunk.whole.file].path, chunk.whole)

    def _prove(self, chunk: _Chunk) -> None:
        for start in range(0, len(chunk.view), CHUNK):
            meant, at = chunk.view[start : start + CHUNK], chunk.at + start
            back = memoryview(self.back)[: len(meant)]
            if os.preadv(self.descriptor, [back], at) != len(meant) or not _same(meant, back):
                raise MismatchError(
                    f"{self.name_of_file}: bytes {at} to {at + len(meant)} read back differently from what was written; "
                    "nothing was kept",
                    code="read-back",
                    key=self.name_of_file,
                    hint="check the disk and the memory of this machine",
                )
            self.digest.update(back)
            meant.release()
        if hasattr(os, "posix_fadvise"):  # starts the write-back now, so that fsync finds little left to do
            os.posix_fadvise(self.descriptor, chunk.at, len(chunk.view), os.POSIX_FADV_DONTNEED)
        self.progress(len(chunk.view))


def tensor_bytes(container: Container, piece: Piece) -> Iterator[Any]:
    """Yield the bytes of a tensor as they are written, in chunks, mapped from the checkpoint where they can be."""
    if piece.source is None or piece.made is not None:
        yield piece.made() if piece.made else b""
        return
    for part in piece.source.parts:
        yield from _part_bytes(container, part)


def _part_bytes(container: Container, part: StoredTensor) -> Iterator[memoryview]:
    start, count = _range_of(container, part)
    data = container.files[container.storages[part.storage.key].file].data
    for at in range(start, start + count, CHUNK):
        yield memoryview(data)[at : min(at + CHUNK, start + count)]
        release(data, max(0, at - 2 * _QUEUE * CHUNK), CHUNK)  # tensors come in the file's order


def _same(a: memoryview, b: memoryview) -> bool:
    """Compare two pieces of equal length; as words, because comparing memoryviews goes byte by byte."""
    import numpy as np

    words = len(a) // 8 * 8
    equal = np.array_equal(np.frombuffer(a[:words], np.uint64), np.frombuffer(b[:words], np.uint64))
    return bool(equal) and bytes(a[words:]) == bytes(b[words:])


def without_rows(tensor: StoredTensor, count: int) -> StoredTensor:
    """Leave out the first rows of a tensor: the rest of it, where it lies."""
    if not count:
        return tensor
    shape = (tensor.shape[0] - count, *tensor.shape[1:])
    return replace(tensor, offset=tensor.offset + count * tensor.stride[0], shape=shape)


def _start(container: Container, tensor: StoredTensor) -> tuple[int, int]:
    """In which of the container's files a tensor starts, and where."""
    where = container.storages[tensor.parts[0].storage.key]
    return where.file, where.start + tensor.parts[0].offset * container.dtype(tensor)[1]


def _range_of(container: Container, part: StoredTensor) -> tuple[int, int]:
    """Where the bytes of a contiguous tensor start in its file, and how many they are."""
    return _start(container, part)[1], math.prod(part.shape) * container.dtype(part)[1]


def _is_finite(data: Any, dtype: str) -> bool:
    import numpy as np

    if dtype == "BF16":
        return not bool(((np.frombuffer(data, np.uint16) & 0x7F80) == 0x7F80).any())
    kind = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(dtype)
    return kind is None or bool(np.isfinite(np.frombuffer(data, kind)).all())


def read_array(container: Container, tensor: StoredTensor) -> np.ndarray[Any, Any]:
    """Read a tensor's numbers, whatever its strides, as a contiguous, read-only array; bfloat16 comes as raw `uint16`."""
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
    if len(tensor.parts) > 1:
        return np.concatenate([read_array(container, part) for part in tensor.parts])
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, kinds[name])
    file, start = _start(container, tensor)
    span = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=True)) + 1
    flat = np.frombuffer(container.files[file].data[start : start + span * width], kinds[name])
    strides = [step * width for step in tensor.stride]
    return np.array(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False), order="C")


def _wide(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Numbers that numpy can compute with: bfloat16, which it does not know, as float32."""
    import numpy as np

    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


def cast(array: np.ndarray[Any, Any], source: str, target: str) -> bytes:
    """Round numbers to another floating point type, to nearest, ties to even, as torch does.

    Args:
        array: the numbers; bfloat16 as raw `uint16`.
        source, target: safetensors dtypes.
    """
    import numpy as np

    if source == target:
        return array.tobytes()
    wide = _wide(array, source)
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
        array, kind = read_array(container, tensor), source
        if edits:  # on numbers of our own: what was read may be a read-only view, and bfloat16 comes as raw bits
            array = _wide(array, source).copy()
            kind = "F32" if source == "BF16" else source
        for edit in edits:
            number = array.dtype.type(edit.what.value)
            array[edit.row] = array[edit.row] + number if isinstance(edit.what, Add) else number
        return cast(array, kind, target)

    return make


def sinusoids(rows: int, width: int) -> np.ndarray[Any, Any]:
    """Compute the table of `fairseq.modules.SinusoidalPositionalEmbedding`, whose row 1 is the padding's: zeros.

    Every step is rounded to float32 as fairseq's is, each function correctly. torch's functions may be off by one unit in
    the last place, differently from machine to machine.
    """
    import math

    import numpy as np

    half = width // 2
    step = np.float32(-(math.log(10000) / (half - 1)))
    frequencies = np.exp((np.arange(half, dtype=np.float32) * step).astype(np.float64)).astype(np.float32)
    angles = (np.arange(rows, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    table = np.zeros((rows, width), np.float32)
    table[:, :half], table[:, half : 2 * half] = np.sin(angles), np.cos(angles)
    table[1] = 0.0
    return table


def _filler(
    container: Container,
    what: What,
    shape: tuple[int, ...],
    dtype: str,
    tensors: Mapping[str, StoredTensor],
    by_target: Mapping[str, str],
) -> Callable[[], bytes]:
    def numbers() -> np.ndarray[Any, Any]:
        import numpy as np

        if isinstance(what, Zeros):
            return np.zeros(shape, np.float32)
        if isinstance(what, Identity):
            return np.eye(*shape, dtype=np.float32)
        if isinstance(what, Sinusoids):
            return sinusoids(what.first + shape[0], shape[1])[what.first :]
        tensor = tensors[by_target[what.key]]
        array = _wide(read_array(container, tensor), container.dtype(tensor)[0])
        squares = (array.astype(np.float64) ** 2).sum(axis=tuple(range(array.ndim - 1)))
        return np.asarray(np.sqrt(squares), np.float32).reshape(shape)

    return lambda: cast(numbers(), "F32", dtype)
