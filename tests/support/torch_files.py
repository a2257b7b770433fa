"""Torch files put together by hand, for what `torch.save` would not write: chosen pickles, entries and storages."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from convert.package import Converted, compare_weights, convert


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def entries(path: Path) -> dict[str, bytes]:
    """The entries of a zip file, their folder left out."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, content: Mapping[str, bytes], folder: str = "archive") -> Path:
    """Write a torch zip file; every CRC is right."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"{folder}/{name}", data)
    return path


def pickles(data: bytes) -> list[bytes]:
    """The five pickles at the head of a legacy file, and the storages after them."""
    stream, ends = io.BytesIO(data), [0]
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    return [data[a:b] for a, b in zip(ends, [*ends[1:], len(data)], strict=True)]


def change_pickle(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Change the pickle that holds the model, in either container."""
    data = path.read_bytes()
    if data[:2] == b"PK":
        content = entries(path)
        return write_zip(path, content | {"data.pkl": change(content["data.pkl"])})
    parts = pickles(data)
    path.write_bytes(b"".join([*parts[:3], change(parts[3]), *parts[4:]]))
    return path


def before(gadget: bytes) -> Callable[[bytes], bytes]:
    """Put opcodes that push one value before a pickle's own, and pop it: the rest stays as it was."""
    return lambda whole: whole[:2] + gadget + b"0" + whole[2:]


def instead(body: bytes) -> Callable[[bytes], bytes]:
    """Another pickle."""
    return lambda whole: whole[:2] + body + b"."


def plain(value: object) -> bytes:
    """The opcodes of plain data."""
    return pickle.dumps(value, 2)[2:-1]


def read(path: Path) -> dict[str, Any]:
    """What torch reads from a file."""
    state: dict[str, Any] = torch.load(path, weights_only=False, map_location="cpu")
    return state


def same(path: Path, folder: Path, **options: Any) -> Converted:
    """Convert, and compare every tensor with what torch reads from the checkpoint."""
    done = convert(path, folder / "model", **options)
    assert compare_weights(path, folder / "model", **options) == []
    written, source = load_file(folder / "model" / "model.safetensors"), read(path)["model"]
    assert set(written) == set(done.model.plan.target)
    for key, target in done.model.plan.renames.items():
        assert written[target].dtype == source[key].dtype
        assert torch.equal(written[target], source[key])
    return done
