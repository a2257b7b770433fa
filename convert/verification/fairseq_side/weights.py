"""A checkpoint's tensors, mapped from its files: the request says where the numbers of each are, and nothing is unpickled."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy
import torch

from .importing import CannotBuildError
from .numerics import ALIGNMENT, NAMES

# safetensors' name of a type -> numpy's; bfloat16, which numpy has not, comes as its bits
KINDS = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"}
KINDS.update({"U8": "u1", "BOOL": "?"})


class Weights:
    """The mapped files of a checkpoint.

    Args:
        files: of each file its `path`, and its `stamp` (see `stamp`) when it was read and hashed.

    Raises:
        CannotBuildError: a file is not the one that was read.
    """

    def __init__(self, files: Any) -> None:
        self.maps = [_mapped(file["path"], file["stamp"]) for file in files]

    def read(self, tensors: Any) -> dict[str, Any]:
        """Map tensors.

        Args:
            tensors: name -> its type, and the parts whose rows, one after the other, are its own; each a list of the
                file's number, the first byte, the shape and the stride in elements.
        """
        return {name: self._tensor(kind, parts) for name, (kind, parts) in tensors.items()}

    def _tensor(self, kind: str, parts: Any) -> Any:
        """Map a tensor; one that is in pieces, or not where torch would allocate it, is copied to where it would."""
        arrays = [self._part(kind, *part) for part in parts]
        plain = len(arrays) == 1 and kind != "BF16" and arrays[0].flags.c_contiguous
        if plain and arrays[0].size and arrays[0].ctypes.data % ALIGNMENT == 0:
            return torch.from_numpy(arrays[0])
        array = arrays[0] if len(arrays) == 1 else numpy.concatenate(arrays)
        if kind == "BF16":
            array = (array.astype("u4") << 16).view("f4")
        copy = torch.empty(array.shape, dtype=torch.from_numpy(numpy.empty(0, array.dtype)).dtype)
        copy.numpy()[...] = array
        return copy.to(NAMES["bfloat16"]) if kind == "BF16" else copy

    def _part(self, kind: str, file: int, start: int, shape: Any, stride: Any) -> Any:
        if 0 in shape:
            return numpy.empty(shape, KINDS[kind])
        width = numpy.dtype(KINDS[kind]).itemsize
        return numpy.ndarray(tuple(shape), KINDS[kind], self.maps[file], start, tuple(step * width for step in stride))


def _mapped(path: str, expected: Any) -> Any:
    """Map a file so that what is written to it stays in this process."""
    # what was put into its place meanwhile may be a pipe, at which opening would wait
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if stamp(file) != list(expected):
            raise CannotBuildError("%s is not the file that was read: it changed meanwhile" % os.path.basename(path))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def stamp(file: Any) -> list[int]:
    """What changes with a file's content: device, inode, size, and the times of its content and of its entry, in nanoseconds."""
    found = os.fstat(file.fileno())
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
