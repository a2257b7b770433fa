"""Move tensors from a checkpoint into safetensors files at the speed of a copy, each byte proved on the way.

Three threads overlap: one hashes the source file, one reads and writes, one checks (CRC-32, finite numbers), reads back
what was written, compares it with what was meant, and hashes it. Memory is a few buffers, whatever the file's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from convert.checkpoint.container import Container, Range, corrupted
from convert.checkpoint.stored import StoredTensor
from convert.errors import CheckpointError, ConvertError, MismatchError, PlanError, Problem
from convert.files import PIECE as CHUNK
from convert.files import create, header_bytes
from convert.pieces import NUMBERS, Piece, part_bytes, range_of, tensor_bytes
from convert.rules import FLOATS

_QUEUE = 8
_SYNCED = 1 << 25  # bytes whose writing to the disk is started at once
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written and read back."""

    name: str
    size: int
    sha256: str


class Transfer:
    """Writes files from one checkpoint while the checkpoint itself is hashed; for use in a `with` statement.

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
        self.checked: set[tuple[int, str]] = set()
        self.free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()  # buffers go from here to the prover and back
        for _ in range(_QUEUE + 2):
            self.free.put(bytearray(CHUNK))
        self.stopped = False
        self.hashing = ThreadPoolExecutor(1)
        self.digest: Future[str] | None = None

    def __enter__(self) -> Transfer:
        with _starting():
            self.digest = self.hashing.submit(self.container.sha256, self._hashed)
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped = True
        self.hashing.shutdown()  # before the file that it reads is closed
        self.digest = None  # an error in it holds this object

    def _hashed(self, count: int) -> None:
        if self.stopped:
            raise InterruptedError
        self.progress(count)

    def source_sha256(self) -> str:
        """Wait for the SHA-256 of the source; see `Container.sha256`."""
        assert self.digest is not None
        return self.digest.result()

    def _read(self, file: BinaryIO, at: int, view: memoryview) -> None:
        """Fill a buffer from a file; reading beats touching a mapping, page by page."""
        done = 0
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done:]], at + done)
            if count == 0:
                name = Path(file.name).name
                raise CheckpointError(f"{name} became shorter while it was read", code="truncated", key=name)
            done += count

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
        head = header_bytes((piece.spec.name, piece.spec.dtype, piece.spec.shape) for piece in listed)
        size = len(head) + sum(piece.count for piece in listed)
        with create(path) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                os.ftruncate(file.fileno(), size)
            with _Prover(file.fileno(), path.name, self.container, self.progress, self.free) as prover:
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
        return Written(path.name, size, prover.digest.hexdigest())

    def _put(self, prover: _Prover, chunk: _Chunk) -> int:
        done = 0
        while done < len(chunk.view):
            done += os.pwrite(prover.descriptor, chunk.view[done:], chunk.at + done)
        end = chunk.at + len(chunk.view)  # the prover gives the view back
        prover.add(chunk)
        return end

    def _chunks(self, piece: Piece, at: int) -> Iterator[_Chunk]:
        """Yield a tensor's bytes: read, where they lie as they are written."""
        parts = piece.source.parts if piece.source is not None else ()
        wholes = [self._whole(part, piece) for part in parts]
        if piece.source is None or piece.made is not None:
            for data in tensor_bytes(self.container, piece):
                yield _Chunk(at, memoryview(data).cast("B") if len(data) else memoryview(b""), piece)
                at += len(data)
            return
        for part, whole in zip(parts, wholes, strict=True):
            if whole is None:
                for data in part_bytes(self.container, part):
                    yield _Chunk(at, data, piece)
                    at += len(data)
                continue
            for start in range(whole.start, whole.start + whole.count, CHUNK):
                buffer = self.free.get()
                view = memoryview(buffer)[: whole.start + whole.count - start]
                self._read(self.container.files[whole.file].file, start, view)
                yield _Chunk(at, view, piece, whole, buffer)
                at += min(CHUNK, whole.start + whole.count - start)

    def _whole(self, part: StoredTensor, piece: Piece) -> Range | None:
        """Return a tensor's storage where the tensor is all of it, so that its CRC-32 is checked on the way.

        A storage that is only used in part, or not as it lies, is checked here.
        """
        where = self.container.storages[part.storage.key]
        if piece.made is None and range_of(self.container, part) == (where.start, where.count):
            return where
        if where.crc is not None and (where.file, where.entry) not in self.checked:
            self.container.check_bytes([part])
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
        self._synced = 0  # up to where the writing to the disk was started

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
            # bytearray compares by memcmp; memoryviews would be compared byte by byte
            if os.preadv(self.descriptor, [back], at) != len(meant) or not self.back.startswith(meant):
                raise MismatchError(
                    f"{self.name_of_file}: bytes {at} to {at + len(meant)} read back differently from what was written; "
                    "nothing was kept",
                    code="read-back",
                    key=self.name_of_file,
                    hint="check the disk and the memory of this machine",
                )
            self.digest.update(back)
            meant.release()
        end = chunk.at + len(chunk.view)
        if end - self._synced >= _SYNCED and hasattr(os, "posix_fadvise"):  # so that fsync finds little left to do
            os.posix_fadvise(self.descriptor, self._synced, end - self._synced, os.POSIX_FADV_DONTNEED)
            self._synced = end
        self.progress(len(chunk.view))


def _is_finite(data: memoryview, dtype: str) -> bool:
    import numpy as np

    if dtype not in FLOATS:
        return True
    numbers = np.frombuffer(data, NUMBERS[dtype])
    return not ((numbers & 0x7F80) == 0x7F80).any() if dtype == "BF16" else bool(np.isfinite(numbers).all())
