"""Opening files that somebody else may have written: regular files only, and bounded where one is read whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from convert.errors import ConvertError
from convert.report import size

RECORD = 100_000_000  # bytes: conversion.json of a model of 1,000 languages has 25 MB
LISTS = 1_000_000_000  # of manifests and transcripts; those of 50,000 hours have 300 MB


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; a directory, a pipe or a device, at which reading might never end, is refused.

    Raises:
        ConvertError: `not-a-file`.
        OSError: it is not there, or may not be read.
    """
    return open(path, "rb", opener=lambda name, flags: regular(path, os.open(name, flags | os.O_NONBLOCK)))


def read_file(path: Path, most: int = RECORD) -> bytes:
    """Read a whole file.

    Args:
        path: the file.
        most: the number of bytes above which it is refused.

    Raises:
        ConvertError: `not-a-file` or `too-large`.
        OSError: it is not there, or may not be read.
    """
    data = bytearray()
    with open_file(path) as file:
        while len(data) <= most and (piece := file.read(1 << 20)):  # asked for more, Python reserves it all
            data += piece
    if len(data) > most:
        message = f"{path} is larger than any file of its kind: {size(most)} at most"
        raise ConvertError(message, code="too-large", key=str(path))
    return bytes(data)


def check_folder(folder: Path) -> None:
    """Refuse a folder, before another library reads in it, that holds a pipe or a device, or a link to one.

    Raises:
        ConvertError: `not-a-file`.
    """
    for path in folder.rglob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise _not_a_file(path)


def regular(path: Path, descriptor: int) -> int:
    """Return the descriptor of a regular file; any other is closed and refused.

    Raises:
        ConvertError: `not-a-file`.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_file(path)
    return descriptor


def _not_a_file(path: Path) -> ConvertError:
    return ConvertError(
        f"{path} is not a regular file",
        code="not-a-file",
        key=str(path),
        hint="it is not read: remove it, or name another",
    )
