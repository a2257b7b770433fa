"""`convert.files`: what is read: hashes, and the headers of safetensors files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from convert import files
from convert.errors import ConvertError
from convert.files import (
    Hashes,
    header_bytes,
    read_header,
    sha256_of,
)


def test_hash(tmp_path: Path) -> None:
    content = os.urandom(3 * files.PIECE + 17)
    (tmp_path / "file").write_bytes(content)
    pieces: list[bytes] = []
    assert (
        sha256_of(tmp_path / "file", lambda piece: pieces.append(bytes(piece))) == hashlib.sha256(content).hexdigest()
    )
    assert b"".join(pieces) == content
    with (tmp_path / "file").open("rb") as file:
        file.seek(5)
        assert sha256_of(file) == hashlib.sha256(content).hexdigest()
        assert file.tell() == 5


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConvertError) as caught:
        sha256_of(tmp_path / "pipe")
    assert caught.value.message == f"{tmp_path / 'pipe'} is not a regular file"


@pytest.mark.parametrize("settled", [True, False])
def test_each_file_is_hashed_once_and_a_change_is_seen(
    settled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = [0]

    def counted(*arguments: Any) -> str:
        count[0] += 1
        return sha256_of(*arguments)

    monkeypatch.setattr(files, "sha256_of", counted)
    monkeypatch.setattr(files, "_SETTLED", -(10**12) if settled else 10**12)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    hashes = Hashes()
    assert hashes.of(path) == hashes.of(path) == hashlib.sha256(b"one").hexdigest()
    hashes.check()
    assert count[0] == (1 if settled else 2)  # what was written just now may change without a trace in its times
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ConvertError) as caught:
        hashes.check()
    assert caught.value.code == "changed"
    path.unlink()
    with pytest.raises(ConvertError, match="changed while it was in use"):
        hashes.check()


def test_a_file_that_changes_while_it_is_hashed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 2 * files.PIECE)
    with pytest.raises(ConvertError, match="changed while it was in use"):
        Hashes().of(path, lambda piece: path.open("ab").write(b"y"))


SPECS = [("a.weight", "F32", (2, 3)), ("b", "BF16", ()), ("c", "U8", (0, 4)), ("d", "BOOL", (5,))]


def test_header_both_ways(tmp_path: Path) -> None:
    head = header_bytes(SPECS)
    assert len(head) % 64 == 0
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + bytes(24 + 2 + 0 + 5))
    with path.open("rb") as file:
        found, metadata = read_header(file)
    assert metadata == {"format": "pt"}
    assert {(name, one.dtype, one.shape) for name, one in found.items()} == set(SPECS)
    assert [one.start - len(head) for one in found.values()] == [0, 24, 26, 26]
    with safe_open(path, "pt") as opened:
        assert {(name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()} == {  # noqa: SIM118
            (name, shape) for name, _, shape in SPECS
        }


def packed(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WRONG = {
    "empty": b"",
    "only a length": (10).to_bytes(8, "little"),
    "a length beyond the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "not JSON": packed(b"{"),
    "not UTF-8": packed(b'{"\xff": 1}'),
    "not an object": packed(b"[]"),
    "no dtype": packed({"x": {"shape": [2], "data_offsets": [0, 8]}}),
    "an unknown dtype": packed({"x": ENTRY | {"dtype": "F33"}}),
    "a negative length": packed({"x": ENTRY | {"shape": [-2]}}),
    "a shape of another size": packed({"x": ENTRY | {"shape": [3]}}),
    "bytes beyond the file": packed({"x": ENTRY}, bytes(4)),
    "more bytes than are named": packed({"x": ENTRY}, bytes(9)),
    "a gap": packed({"x": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)),
    "an overlap": packed({"x": ENTRY, "y": ENTRY}),
    "metadata that is not text": packed({"__metadata__": {"a": 1}, "x": ENTRY}),
}
DEEP = {"a name twice": packed(b'{"x": %s, "x": %s}' % ((json.dumps(ENTRY).encode(),) * 2))}
DEEP["nested too deeply"] = packed(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")


@pytest.mark.parametrize("name", [*WRONG, *DEEP])
def test_wrong_headers_are_refused_as_safetensors_refuses_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((WRONG | DEEP)[name])
    with path.open("rb") as file, pytest.raises(ValueError):
        read_header(file)
    if name in WRONG:
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass
    path.write_bytes(packed({"x": ENTRY}))  # the control
    with path.open("rb") as file:
        assert read_header(file)[0]["x"].count == 8
