"""A safetensors file, both ways, without the package of that name."""

from __future__ import annotations

import json
from typing import Any

import numpy


def write(path: str, arrays: Any, about: str) -> None:
    """Write a safetensors file: eight bytes of length, a JSON header, the numbers."""
    kinds = {"float32": "F32", "float64": "F64", "int16": "I16"}
    header: dict[str, Any] = {"__metadata__": {"recording": about}}
    at = 0
    for name in sorted(arrays):
        end = at + arrays[name].nbytes
        header[name] = {
            "dtype": kinds[str(arrays[name].dtype)],
            "shape": list(arrays[name].shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(arrays):
            file.write(numpy.ascontiguousarray(arrays[name]).tobytes())


def read(path: str) -> tuple[Any, str]:
    """Read a file that `write` wrote: the arrays by name, and the text."""
    with open(path, "rb") as file:
        return parse(file)


def parse(file: Any) -> tuple[Any, str]:
    """Read an open file that `write` wrote: the arrays by name, and the text."""
    kinds = {"F32": numpy.float32, "F64": numpy.float64, "I16": numpy.int16}
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")).decode())
    data = file.read()
    about = header.pop("__metadata__")["recording"]
    arrays = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        arrays[name] = numpy.frombuffer(data[start:end], kinds[entry["dtype"]]).reshape(entry["shape"]).copy()
    return arrays, about
