"""Working directories, in which new files and directories are made, and the renames that put these into place.

A working directory lies beside the place, is called `.fairseq-to-hf.NAME.RANDOM.part`, is private to the user, and holds a
lock file that its process keeps locked. What a killed process left is known by that lock, and nothing else is removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.interrupts import shielded
from convert.reading import read_file

NEW = "new"  # the directory that is being made
PART = re.compile("[0-9a-f]{16}")  # a file that is made in several runs
_OLD, _LOCK, _STATE = "old", ".fairseq-to-hf", "replaced.json"
_PREFIX, _SUFFIX = ".fairseq-to-hf.", ".part"
_NOREPLACE, _EXCHANGE = 1, 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


# --- a working directory's life -------------------------------------------------------------------------------------


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Make a working directory for a target; whatever happens, it is removed.

    Raises:
        ConvertError: `kept`: something was put into a directory while it was replaced, under the name of a new file.
    """
    left: list[str] = []
    with contextlib.ExitStack() as stack:
        with shielded():
            sweep(target.parent, target.name)
            work = make(target, stack)

            stack.callback(lambda: left.extend(_cleared(work, target)))
        with naming(target, work):
            yield work
    if left:
        message = f"{target} was written; what was put into the one before at that moment is kept: {', '.join(left)}"
        raise ConvertError(message, code="kept", key=str(work), hint=f"move it out of {work}")


def _cleared(work: Path, target: Path) -> list[str]:
    with shielded(), contextlib.suppress(OSError):
        return clear(work, target)
    return []


@contextlib.contextmanager
def naming(target: Path, work: Path) -> Iterator[None]:
    """Let an error of the system name the file that was to be made, and not the working directory, or nothing."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        if not (error.errno in _FULL if not name else work in (Path(name), *Path(name).parents)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def make(target: Path, stack: contextlib.ExitStack) -> Path:
    """Make a working directory, locked for as long as the stack lives."""
    for _ in range(100):
        work = target.with_name(f"{_start(target.name)}{os.urandom(8).hex()}{_SUFFIX}")
        with naming(target, work):
            check_parent(target)
            try:
                work.mkdir(mode=0o700)
            except FileExistsError:
                continue
            try:
                lock = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # taken for a leftover before it had its lock
                continue
            except OSError:
                work.rmdir()
                raise
        stack.callback(os.close, lock)
        with contextlib.suppress(OSError):  # a file system without locks: nothing is ever taken for a leftover there
            _flock(lock, wait=True)
        if os.fstat(lock).st_nlink:
            return work
    raise busy(target)


@contextlib.contextmanager
def held(work: Path) -> Iterator[bool]:
    """Take the lock of a working directory whose process is gone, and say whether there is one.

    Raises:
        BlockingIOError: its process lives.
    """
    with contextlib.ExitStack() as stack:
        taken = False
        try:
            lock = os.open(work / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, lock)
            _flock(lock, wait=False)
            taken = stat.S_ISREG(os.fstat(lock).st_mode) and os.fstat(lock).st_nlink == 1
        except BlockingIOError:
            raise
        except OSError:  # not one of ours, or a file system without locks
            pass
        yield taken


def _flock(descriptor: int, wait: bool) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _start(name: str) -> str:
    """The beginning of the names of a target's working directories."""
    raw = os.fsencode(name)
    return f"{_PREFIX}{name if len(raw) <= 200 else hashlib.sha256(raw).hexdigest()}."


def leftovers(folder: Path, name: str = "") -> Iterator[Path]:
    """List the working directories of one target, or of all in a directory; those of living processes too."""
    start = re.escape(_start(name)) if name else re.escape(_PREFIX) + r".+\."
    pattern = re.compile(start + "[0-9a-f]{16}" + re.escape(_SUFFIX), re.DOTALL)
    with contextlib.suppress(OSError):
        yield from (folder / name for name in _names(folder) if pattern.fullmatch(name) and is_directory(folder / name))


def sweep(folder: Path, name: str = "") -> None:
    """Finish what killed processes left in a directory: for the place of one name, or for all.

    Touched are only directories with the name of a working directory that are empty, or hold a lock that no process has.
    """
    for work in leftovers(folder, name):
        with shielded(), contextlib.suppress(OSError), held(work) as taken:
            if taken:
                clear(work, folder / (name or work.name[len(_PREFIX) :].rsplit(".", 2)[0]))
            else:
                work.rmdir()  # its process was killed before it had made the lock


def clear(work: Path, target: Path) -> list[str]:
    """Remove a working directory, and the replaced directory that is in it; finish or undo a replacement before.

    Returns:
        What is not ours to remove, and could not be moved to where it belongs; it stays, and so does the directory.
    """
    new, old = work / NEW, work / _OLD
    state = _state(work)
    if state:
        where = next((place for place in (old, new) if _inode(place) == state["old"]), None)
        if where == old and _inode(new) == state["new"]:  # moved aside, and the new one not in its place: undo
            if os.path.lexists(target):
                return [_OLD]
            old.rename(target)
            sync(target.parent)
        elif where and (left := _retire(where, target, state["files"])):
            return left
        if _inode(new) not in (None, state["new"]):
            return [NEW]
    shutil.rmtree(new, ignore_errors=True)
    for name in _names(work):
        if name in (target.name, _STATE, _STATE + _SUFFIX) or PART.fullmatch(name):
            (work / name).unlink()
    if _names(work) == [_LOCK]:
        (work / _LOCK).unlink()
        work.rmdir()
    return []


def _retire(old: Path, target: Path, files: dict[str, Any]) -> list[str]:
    """Empty a directory that was replaced: files that are as they were listed go, all others move into the new one."""
    left = []
    for name in _names(old):
        if name in files and _identity(old / name) == files[name]:
            (old / name).unlink()
            continue
        try:
            rename_new(old / name, target / name)
        except (OSError, ConvertError):
            left.append(name)
    if not left:
        old.rmdir()
    return left


def _state(work: Path) -> dict[str, Any]:
    """What the process of a working directory was about to replace; empty before it was. What cannot be read stays."""
    try:
        state = json.loads(read_file(work / _STATE))
    except FileNotFoundError:
        return {}
    except ValueError:
        state = None
    if not isinstance(state, dict) or state.keys() != {"old", "new", "files"} or not isinstance(state["files"], dict):
        raise OSError(errno.EINVAL, "not a note of what was replaced", str(work / _STATE))
    return state


# --- into place -----------------------------------------------------------------------------------------------------


def check_parent(path: Path) -> None:
    """Refuse a place in no directory."""
    if not path.parent.is_dir():
        message = f"{path.parent} is not a directory; nothing was written"
        raise ConvertError(message, code="no-parent", key=str(path), hint="make it first")


def in_the_way(path: Path, what: str, hint: str, code: str = "exists") -> ConvertError:
    """The refusal of a place that is taken."""
    return ConvertError(f"{path} {what}; nothing was written", code=code, key=str(path), hint=hint)


def busy(path: Path) -> ConvertError:
    """The refusal of a place that another process works on."""
    return ConvertError(f"{path}: another process is writing it", code="busy", key=str(path), hint="wait for it")


def place_directory(work: Path, path: Path, removable: Callable[[], Collection[str]]) -> None:
    """Put a working directory's new directory into place, or exchange it for the one that is there.

    Args:
        work: the working directory.
        path: the place.
        removable: names the files that may be removed with the old directory, or raises if it may not be replaced.
    """
    new = old = work / NEW
    try:
        new.rename(path)  # POSIX: takes the place of nothing or of an empty directory, and of nothing else
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    else:
        sync(path.parent)
        return
    names, there = removable(), _inode(path)
    listed = {name: _identity(path / name) for name in _names(path)}
    for name in sorted(listed.keys() - names):
        if os.path.lexists(new / name):
            raise in_the_way(path / name, "was put there meanwhile", "move it elsewhere, and run it again")
        if listed[name]:
            _copy(path / name, new / name)
    _note(work, {"old": there, "new": _inode(new), "files": {name: one for name, one in listed.items() if one}})
    sync(new)
    if not _rename_as(_EXCHANGE, new, path):  # in two steps; killed between them, the next run undoes the first
        old = work / _OLD
        path.rename(old)
    try:
        if _inode(old) != there:
            raise in_the_way(path, "was replaced meanwhile", "run it again")
        if old != new:
            new.rename(path)
    except BaseException:
        if old != new:
            old.rename(path)
        else:
            _rename_as(_EXCHANGE, new, path)
        raise
    sync(path.parent)


def _copy(source: Path, target: Path) -> None:
    """Give a file a second name, or, where the file system has none, make a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not target.is_symlink():
            sync(target)


def _note(work: Path, state: dict[str, Any]) -> None:
    with (work / (_STATE + _SUFFIX)).open("xb") as file:
        file.write(json.dumps(state).encode())
        file.flush()
        os.fsync(file.fileno())
    (work / (_STATE + _SUFFIX)).rename(work / _STATE)
    sync(work)


def rename_new(source: Path, target: Path) -> None:
    """Rename, unless something has the name by now.

    Raises:
        ConvertError: `exists`.
    """
    try:
        if _rename_as(_NOREPLACE, source, target):
            return
        if source.is_symlink() or source.is_dir():
            if os.path.lexists(target):
                raise FileExistsError
            source.rename(target)
            return
        try:
            os.link(source, target)
        except FileExistsError:
            raise
        except OSError:  # the file system has no second names: take the name, then its place
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
            source.replace(target)
        else:
            source.unlink()
    except FileExistsError:
        raise in_the_way(target, "appeared meanwhile", "choose another name, or move it away") from None


def _rename_as(how: int, source: Path, target: Path) -> bool:
    """Rename in one of two ways that Python has no function for; `False` where the system or the file system cannot."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            rename, here, flag = library.renameatx_np, -2, {_NOREPLACE: 4, _EXCHANGE: 2}[how]
        else:
            rename, here, flag = library.renameat2, -100, how
    except AttributeError:
        return False
    if rename(here, os.fsencode(source), here, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def is_directory(path: Path) -> bool:
    """Whether a path is a directory, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def _identity(path: Path) -> list[int] | None:
    """What tells a file from any other, and from itself after a change; `None` for what is neither a file nor a link."""
    found = path.lstat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
