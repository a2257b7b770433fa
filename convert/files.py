"""Everything that is done with files once: SHA-256, safetensors headers, new files and directories.

What is new is made in a working directory beside its place (see `convert.workspace`), and renamed into place when it is
whole: whatever happens before, nothing is there, or what was there. A link is replaced or refused, never written through.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from convert import workspace
from convert.errors import ConvertError
from convert.interrupts import shielded
from convert.reading import open_file, regular
from convert.workspace import in_the_way, is_directory

# safetensors dtype -> bytes an element
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
PIECE = 1 << 20
_HEADER = 100_000_000  # the longest header that the safetensors library reads
_SETTLED = 2_000_000_000  # nanoseconds after which a change shows in a file's times, on the coarsest file system
Replaceable = Callable[[Path], Collection[str]]


# --- reading --------------------------------------------------------------------------------------------------------


def sha256_of(source: Path | BinaryIO, also: Callable[[memoryview], object] | None = None) -> str:
    """Hash a file in constant memory; of one that grows meanwhile, what it had at first.

    Args:
        source: the file; the position of an open one is left alone.
        also: is given each piece too, for a second digest in the same pass.
    """
    with open_file(source) if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
        while count := os.preadv(file.fileno(), [buffer[: size - at]], at):
            digest.update(buffer[:count])
            if also:
                also(buffer[:count])
            at += count
    return digest.hexdigest()


class Hashes:
    """The SHA-256 of files, each of which is read once, and what they were then: to be checked at the end."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], bool, str]] = {}

    def of(self, path: Path, also: Callable[[memoryview], object] | None = None) -> str:
        """Return a file's SHA-256; `also` as for `sha256_of`.

        Raises:
            ConvertError: `changed`: while it was read.
        """
        if path not in self._known:
            with open_file(path) as file:
                settled = time.time_ns() - os.fstat(file.fileno()).st_ctime_ns > _SETTLED
                before = stamp(os.fstat(file.fileno()))
                found = sha256_of(file, also)
                if stamp(os.fstat(file.fileno())) != before:
                    raise _changed(path)
            self._known[path] = (before, settled, found)
        return self._known[path][2]

    def check(self) -> None:
        """Refuse if a file is no longer what was hashed.

        Raises:
            ConvertError: `changed`.
        """
        for path, (before, settled, digest) in self._known.items():
            try:
                same = stamp(path.stat()) == before and (settled or sha256_of(path) == digest)
            except FileNotFoundError:
                same = False
            if not same:
                raise _changed(path)


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from any other, and changes with its content: device, inode, size, and the times of both."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _changed(path: Path) -> ConvertError:
    message = f"{path} changed while it was in use"
    return ConvertError(message, code="changed", key=path.name, hint="run it again when nothing writes there")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file.

    Args:
        dtype, shape: what it is.
        start, count: its bytes' place in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    count: int


def read_header(file: BinaryIO) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read the header of an open safetensors file, as strictly as the safetensors library does.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        ValueError: what is wrong with it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    try:
        entries = json.loads(file.read(length).decode(), object_pairs_hook=_once)
        metadata = entries.pop("__metadata__", {})
        found = {name: _stored(entry, 8 + length) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header does not describe tensors: {error!r}") from None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is not text")
    at = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].count)):
        if tensor.start != at:
            raise ValueError(f"the bytes of {name} start at {tensor.start}, expected {at}")
        at += tensor.count
    if at != size:
        raise ValueError(f"{size} bytes, expected {at}")
    return found, metadata


def _stored(entry: dict[str, Any], first: int) -> Stored:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in WIDTHS:
        raise ValueError(f"unknown dtype {dtype}")
    if len(shape) > 64 or not all(type(length) is int and 0 <= length < 2**62 for length in (*shape, start, end)):
        raise ValueError(f"shape {shape}, bytes {start} to {end}")
    count = WIDTHS[dtype] * math.prod(shape)
    if end - start != count:
        raise ValueError(f"shape {shape} of {dtype} in bytes {start} to {end}")
    return Stored(dtype, tuple(shape), first + start, count)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("its header has a key twice")
    return made


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Make the header of a safetensors file, padded so that the data starts at a multiple of 64.

    That is where torch allocates, too: of what is mapped at other addresses, products may round differently.

    Args:
        tensors: (name, dtype, shape) of each, in the order of their bytes.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + WIDTHS[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


# --- writing --------------------------------------------------------------------------------------------------------


def check_file(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, a file that could not be put into its place, or would replace one unasked.

    Raises:
        ConvertError: `exists` or `no-parent`, status 2.
    """
    workspace.check_parent(path)
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise in_the_way(path, "is a directory", "choose another name")
    if not overwrite:
        raise in_the_way(path, "exists already", "choose another name, or replace it with --overwrite")
    if not path.is_file():
        raise in_the_way(path, "is not a file that can be replaced", "choose another name")


def check_directory(path: Path, replaceable: Replaceable | None = None) -> Collection[str]:
    """Refuse, before any work, a directory that could not be put into its place, or would replace something unasked.

    What an interrupted run moved aside is put back first.

    Args:
        path: the directory to make.
        replaceable: names the files that may be removed with a directory that is replaced, or raises if it may not be
            replaced; `None` where nothing but an empty directory may be.

    Returns:
        Those names; none where there is no directory to replace.

    Raises:
        ConvertError: `usage`, `no-parent`, `exists`, `not-ours`, status 2.
    """
    if path.name in ("", ".."):  # Path(".").name is empty: it would be made inside the working directory, not beside it
        message = f"{path} is not the name of a new directory; nothing was written"
        raise ConvertError(message, code="usage", key=str(path), hint="name the directory to make, such as my-model")
    workspace.check_parent(path)
    workspace.sweep(path.parent, path.name)
    if not os.path.lexists(path) or (is_directory(path) and not any(path.iterdir())):
        return ()
    if replaceable is None and path.is_dir():
        raise in_the_way(path, "exists already", "choose another name, or replace it with --overwrite")
    if not is_directory(path):
        what = "is a link" if path.is_symlink() else "is a file"
        raise in_the_way(path, what, "choose another name", "not-ours" if replaceable else "exists")
    return replaceable(path) if replaceable else ()


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Make a file: write it at the path that this yields; it is renamed into place when all went well.

    Args:
        path: the file.
        overwrite: whether one that is there is replaced; else one that appears meanwhile is left as it is.

    Raises:
        ConvertError: what `check_file` raises, before or when it is done.
        OSError: the disk is full, and the like.
    """
    check_file(path, overwrite)
    with workspace.workspace(path) as work:
        yield work / path.name
        workspace.sync(work / path.name)
        _place(work / path.name, path, overwrite)


def write_file(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write a small file, as `new_file` does."""
    with new_file(path, overwrite=overwrite) as made, create(made) as file:
        file.write(content)


@contextlib.contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Open a file that must not exist, in a place of our own, for writing and reading; its bytes are on the disk at the end.

    Args:
        path: what `new_file` yielded, or a name in what `new_directory` yielded.
    """
    with path.open("xb+") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _place(made: Path, path: Path, overwrite: bool) -> None:
    with shielded():
        check_file(path, overwrite)
        if overwrite:
            made.replace(path)
        else:
            workspace.rename_new(made, path)
        workspace.sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path, replaceable: Replaceable | None = None) -> Iterator[Path]:
    """Make a directory: fill the one that this yields; it is renamed into place when all went well.

    A directory that is replaced goes only then, and only the files in it that `replaceable` names. Whatever else is in it
    by then stays, in the new one.

    Args:
        path: the directory.
        replaceable: as for `check_directory`, which is called before the work and again when it is done.

    Raises:
        ConvertError: what `check_directory` raises; `exists`, of a file that was put into the old directory meanwhile,
            where the new one has a file of this name; `kept`, of one that came at the very moment of the exchange.
        OSError: the disk is full, and the like.
    """
    check_directory(path, replaceable)
    with workspace.workspace(path) as work:
        (work / workspace.NEW).mkdir()
        yield work / workspace.NEW
        workspace.sync(work / workspace.NEW)
        with shielded():
            workspace.place_directory(work, path, lambda: check_directory(path, replaceable))


@contextlib.contextmanager
def resumed_file(path: Path, version: str) -> Iterator[BinaryIO]:
    """Make a file in several runs: yields it opened for appending, with what earlier runs wrote of this version.

    When all went well it is renamed into place, and what is left of other versions goes; else it is kept.

    Args:
        path: the file; it must not exist.
        version: names the bytes that belong together.

    Raises:
        ConvertError: what `check_file` raises, or `busy`: another process is making it; status 2.
    """
    check_file(path, overwrite=False)
    name = hashlib.sha256(version.encode()).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        with shielded():
            work = _resume(path, name, stack) or workspace.make(path, stack)
            stack.callback(_clear_empty, work, name, path)
            stack.enter_context(workspace.naming(path, work))
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = stack.enter_context(os.fdopen(os.open(work / name, flags, 0o666), "a+b"))
        yield file
        file.flush()
        os.fsync(file.fileno())
        _place(work / name, path, overwrite=False)
    workspace.sweep(path.parent, path.name)


def _clear_empty(work: Path, name: str, path: Path) -> None:
    """Remove a working directory unless it holds bytes to go on from."""
    with shielded(), contextlib.suppress(OSError):
        if not (work / name).exists() or not (work / name).stat().st_size:
            workspace.clear(work, path)


def _resume(path: Path, name: str, stack: contextlib.ExitStack) -> Path | None:
    """Find what an earlier run left, and take its lock; what may be another user's, or has a second name, is not taken."""
    for work in workspace.leftovers(path.parent, path.name):
        with contextlib.ExitStack() as lock, contextlib.suppress(FileNotFoundError):
            try:
                taken = lock.enter_context(workspace.held(work))
            except BlockingIOError:
                raise workspace.busy(path) from None
            found = (work / name).lstat()
            if taken and stat.S_ISREG(found.st_mode) and (found.st_nlink, found.st_uid) == (1, os.geteuid()):
                stack.push(lock.pop_all())
                return work
    return None


def resumable(path: Path) -> list[tuple[Path, int]]:
    """List what interrupted runs of `resumed_file` kept of a file, with the sizes."""
    found = [entry for work in workspace.leftovers(path.parent, path.name) for entry in work.iterdir()]
    return [(entry, entry.lstat().st_size) for entry in found if workspace.PART.fullmatch(entry.name)]


def open_log(path: Path) -> BinaryIO:
    """Open a file that grows line by line, for appending and reading; it is made when missing. A link is refused."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(regular(path, os.open(path, flags, 0o666)), "a+b", buffering=0)


def scratch_file() -> BinaryIO:
    """Open a private file for what is not kept; it goes when it is closed. Its `name` is its path."""
    import tempfile

    return cast(BinaryIO, tempfile.NamedTemporaryFile(prefix="fairseq-to-hf-"))


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Make a private directory for what is not kept."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fairseq-to-hf-") as folder:
        yield Path(folder)
