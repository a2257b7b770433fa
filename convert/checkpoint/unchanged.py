"""Use a checkpoint, and refuse what was done with it where its file changed meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.errors import CheckpointError


@contextlib.contextmanager
def unchanged(path: str | Path, **options: Any) -> Iterator[Checkpoint]:
    """Open a checkpoint, and hold it against its file when the work is done.

    Args:
        path, options: as for `open_checkpoint`.

    Raises:
        CheckpointError: it cannot be read; or `changed`, where its file is another one, or was written to, since.
    """
    before = _named(Path(path))
    with open_checkpoint(path, **options) as opened:
        stamps = [stamp(one.original.file) for one in opened.container.files]
        try:
            yield opened
        finally:
            again = [stamp(one.original.file) for one in opened.container.files]
            if again != stamps or _named(Path(path)) != before:
                raise CheckpointError(
                    f"{opened.path.name} changed while it was read; nothing was written",
                    code="changed",
                    key=opened.path.name,
                    hint="run the command again once nothing writes to the file any more",
                )


def stamp(file: BinaryIO) -> list[int]:
    """Say what changes with a file's content: device, inode, size, and the times of its content and of its entry."""
    return _stamp(os.fstat(file.fileno()))


def _named(path: Path) -> list[int]:
    """The same of the file that a path leads to now."""
    try:
        return _stamp(path.stat()) if path.is_file() else []
    except OSError:
        return []


def _stamp(found: os.stat_result) -> list[int]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
