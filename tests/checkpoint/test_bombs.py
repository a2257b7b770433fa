"""Checkpoints that want to take all memory or time: each is refused in a process that has little of both."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ROOT
from fairseq_models import save
from torch_files import change_pickle, entries, instead, plain, text, write_zip

from convert.checkpoint import unpickle
from convert.errors import CheckpointError

MEMORY, SECONDS = 900_000_000, 30  # of address space, numpy's threads included, for a whole process


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save("ctc_base", tmp_path_factory.mktemp("clean") / "clean.pt").read_bytes()


def laughs(depth: int = 60, first: bytes = b"NN") -> bytes:
    """A tuple that holds a tuple twice, and so on: few bytes, 2**depth leaves."""
    made = b"(" + first + b"tr\0\0\1\0"
    for level in range(depth):
        index = (0x10000 + level).to_bytes(4, "little")
        made += b"0(j" + index + b"j" + index + b"tr" + (0x10001 + level).to_bytes(4, "little")
    return made


def top(**values: bytes) -> bytes:
    """A checkpoint's dict with a value at some keys."""
    return b"}" + b"".join(text(key) + value + b"s" for key, value in values.items())


# Each a whole pickle in a file that is a checkpoint otherwise -> the code it is refused with
NUMPY = b"cnumpy.core.multiarray\nscalar\n"
BOMBS = {
    "memo": (b"N" + b"\x94" * 3_000_000, "corrupted-pickle"),
    "stack": (b"N" + b"2" * 20_000_000, "corrupted-pickle"),
    "sets": (top(model=b"(" + b"\x8f" * 900_000 + b"t"), "corrupted-pickle"),
    "deep-lists": (top(model=b"]" * 400_000 + b"a" * 399_999), "corrupted-pickle"),
    "deep-tuples": (top(model=b"N" + b"\x85" * 400_000), "corrupted-pickle"),
    "deep-key": (b"}N" + b"\x85" * 200_000 + b"Ns", "corrupted-pickle"),
    "deep-objects": (top(model=b"cx\nY\n)\x81" * 100_000 + b"b" * 99_999), "corrupted-pickle"),
    "laughs-key": (b"}" + laughs() + b"Ns", "corrupted-pickle"),
    "laughs-model": (top(model=laughs()), "foreign-file"),
    "laughs-numpy-scalar": (NUMPY + b"(cnumpy\ndtype\n" + laughs() + b"\x85RC\x01atR", "foreign-file"),
    "laughs-storage-view": (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01(" + laughs() + b"NNttQ",
        "corrupted-pickle",
    ),
    "laughs-object-key": (top(model=b"}cx\nY\n" + laughs() + b"RNs"), "foreign-file"),
    "list-cycle": (top(model=b"]r\0\0\0\x01j\0\0\0\x01a"), "foreign-file"),
    "copied-list": (
        b"](" + b"N" * 400_000 + b"er\0\0\0\x01" + b"c__builtin__\nlist\nj\0\0\0\x01\x85R" * 2_000,
        "corrupted-pickle",
    ),
    "copied-text": (
        b"c_codecs\nencode\nr\0\0\0\x01"
        + text("a" * 1_000_000)
        + b"r\0\0\0\x02"
        + b"j\0\0\0\x01j\0\0\0\x02N\x86R" * 2_000,
        "corrupted-pickle",
    ),
    "copied-dict": (
        b"}r\0\0\0\x01"
        + b"("
        + b"".join(b"J" + n.to_bytes(4, "little") + b"N" for n in range(200_000))
        + b"u"
        + b"ccollections\nOrderedDict\nj\0\0\0\x01\x85R" * 3_000,
        "corrupted-pickle",
    ),
    "sized-bytes": (top(model=b"cbuiltins\nbytearray\nJ\0\0\0\x7f\x85R"), "corrupted-pickle"),
    "long-text": (b"X\xff\xff\xff\x7f", "corrupted-pickle"),
    "longer-text": (b"\x8d" + b"\xff" * 7 + b"\x7f", "corrupted-pickle"),
    "long-bytes": (b"\x8e" + b"\xff" * 7 + b"\x3f", "corrupted-pickle"),
    "long-bytearray": (b"\x96" + b"\xff" * 8, "corrupted-pickle"),
    "long-frame": (b"\x95" + b"\xff" * 8, "corrupted-pickle"),
    "long-number": (b"\x8b\0\0\x10\0" + b"\x01" * 0x100000, "corrupted-pickle"),
    "long-digits": (b"I" + b"9" * 5_000_000 + b"\n", "corrupted-pickle"),
    "colliding-keys": (
        b"}("
        + b"".join(b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little") + b"N" for n in range(1, 100_000))
        + b"u",
        "corrupted-pickle",
    ),
    "colliding-memo": (b"".join(b"Np%d\n" % (n * (2**61 - 1)) for n in range(1, 100_000)), "corrupted-pickle"),
}


def run_limited(path: Path) -> tuple[int, list[str]]:
    """Run the command in a process of little memory; return its exit status and the codes of its problems."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    command = [sys.executable, "-m", "convert", "convert", "--json", path.name, "model"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=path.parent, env=environment, capture_output=True, timeout=SECONDS, preexec_fn=limit
    )
    assert done.stderr == b""
    problems = json.loads(done.stdout)["problems"]
    left = {entry.name for entry in path.parent.iterdir()}
    assert left == ({path.name} if problems else {path.name, "model"})
    return done.returncode, sorted({problem["code"] for problem in problems})


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_does_not_go_off(name: str, checkpoint: bytes, tmp_path: Path) -> None:
    body, code = BOMBS[name]
    path = tmp_path / "bomb.pt"
    path.write_bytes(checkpoint)
    assert run_limited(change_pickle(path, instead(body))) == (2, [code])


@pytest.mark.parametrize("count", [1 << 20, 1 << 27])
@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e", b"\x96"], ids=["text", "bytes", "bytearray"])
def test_a_sparse_pickle_takes_no_memory(opcode: bytes, count: int, tmp_path: Path) -> None:
    """A legacy file of a few kilobytes on the disk, whose main pickle holds four texts of zeros, harmless or huge."""
    path = tmp_path / "sparse.pt"
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {}):
            file.write(b"\x80\x02" + plain(value) + b".")
        file.write(b"\x80\x02(")
        for _ in range(4):
            file.write(opcode + count.to_bytes(8, "little"))
            file.seek(count, 1)
        file.write(b"t.\x80\x02].")
    assert path.stat().st_blocks * 512 < 1 << 20
    assert run_limited(path) == (2, ["foreign-file" if count == 1 << 20 else "corrupted-pickle"])


def test_a_sparse_pickle_in_a_zip_takes_no_memory(checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sparse.pt"
    path.write_bytes(checkpoint)
    checkpoint = write_zip(path, entries(path)).read_bytes()  # as Python writes it, with a plain directory
    grown = 500_000_000
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    at = checkpoint.index(b"PK\x01\x02")
    directory, end = checkpoint[at:], checkpoint.index(b"PK\x05\x06")
    with path.open("wb") as file:  # the pickle behind everything else, and after it a hole that belongs to it
        start = file.write(checkpoint[:at])
        header = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, grown, grown, len(name), 0)
        file.write(header + name.encode() + b"\x80\x02")
        file.seek(grown - 2, 1)
        place = file.tell()
        entry = directory.index(name.encode()) - 46
        row = bytearray(directory[entry : entry + 46])
        row[16:28] = struct.pack("<3L", 0, grown, grown)
        row[42:46] = struct.pack("<L", start)
        file.write(directory[:entry] + row + directory[entry + 46 : end - at])
        tail = bytearray(checkpoint[end:])
        tail[16:20] = struct.pack("<L", place)
        file.write(tail)
    assert path.stat().st_blocks * 512 < 1 << 22
    assert run_limited(path) == (2, ["hostile-zip"])


def test_the_limits_let_a_checkpoint_through(checkpoint: bytes, tmp_path: Path) -> None:
    (tmp_path / "good.pt").write_bytes(checkpoint)
    assert run_limited(tmp_path / "good.pt") == (0, [])


def _nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


def _twice(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made, made]
    return made


LETTERS = "\u00e9" * 1_000_000
# setting of the model -> exit status and code
SETTINGS: dict[str, tuple[dict[str, Any], int, str]] = {
    "laughs": ({"a": _twice(50)}, 2, "corrupted-settings"),
    "deep": ({"a": _nested(120)}, 2, "corrupted-settings"),
    "text-many-times": ({"a": [LETTERS] * 50_000}, 2, "corrupted-settings"),
    "number-of-1000-bytes": ({"a": 1 << 8000}, 2, "corrupted-pickle"),
    "number-of-100-bits": ({"a": 1 << 100}, 2, "corrupted-settings"),
    "references-multiplied": (
        {"a0": "x" * 100_000} | {f"a{n + 1}": f"${{model.a{n}}}" * 50 for n in range(3)},
        2,
        "corrupted-settings",
    ),
    "references-to-long-text": (
        {"a": "$" + "{" + "b" * 10_000 + "}"} | {f"a{n}": "${model.a}" for n in range(1000)},
        2,
        "corrupted-settings",
    ),
    "references-chained": ({f"a{n}": f"${{model.a{n + 1}}}" for n in range(50_000)}, 2, "corrupted-settings"),
    "reference-to-itself": ({"activation_fn": "${model.activation_fn}"}, 1, "unsupported-setting"),
    "expression": ({"conv_feature_layers": "__import__('os').system('touch canary')"}, 1, "bad-setting"),
    "expression-repeated": ({"conv_feature_layers": "[(512, 3, 2)] * 999999999"}, 1, "bad-setting"),
    "expression-deep": ({"conv_feature_layers": "[" * 2000 + "]" * 2000}, 1, "bad-setting"),
    "expression-power": ({"conv_feature_layers": "9**9**9**9"}, 1, "bad-setting"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_do_not_expand(name: str, tmp_path: Path) -> None:
    change, status, code = SETTINGS[name]
    state = _load(save("pretrained_base", tmp_path / "settings.pt"))
    state["cfg"]["model"] |= change
    torch.save(state, tmp_path / "settings.pt")
    found, codes = run_limited(tmp_path / "settings.pt")
    assert found == status
    assert code in codes


VIEWS = {
    "line": torch.zeros(1).expand(1 << 40),
    "square": torch.zeros(1).expand(1 << 20, 1 << 20),
    "overlapping": torch.zeros(1 << 14).as_strided((1 << 13, 1 << 13), (1, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_view_larger_than_the_file(name: str, tmp_path: Path) -> None:
    state = _load(save("pretrained_base", tmp_path / "view.pt"))
    state["model"]["mask_emb"] = VIEWS[name]
    torch.save(state, tmp_path / "view.pt")
    assert run_limited(tmp_path / "view.pt") == (2, ["size-bomb"])


def _load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=False)
    return state


@pytest.mark.parametrize("where", ["setting", "name"])
def test_more_layers_than_tensors(where: str, tmp_path: Path) -> None:
    state = _load(save("pretrained_base", tmp_path / "layers.pt"))
    if where == "setting":
        state["cfg"]["model"]["encoder_layers"] = (1 << 31) - 1
    else:
        state["model"]["feature_extractor.conv_layers.99999999.0.weight"] = torch.zeros(1, 1, 1)
    torch.save(state, tmp_path / "layers.pt")
    status, codes = run_limited(tmp_path / "layers.pt")
    assert status == 1
    assert "memory" not in codes


def test_steps_are_bounded_however_large_a_file_pretends_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_STEPS", 100), ("_BYTES", 32), ("_MOST", 150)):
        monkeypatch.setattr(unpickle, name, value)

    def read(pairs: int, behind: int) -> object:
        return unpickle.load(b"\x80\x02" + b"N0" * pairs + b"N." + bytes(behind), 0, "x.pt").value

    assert read(48, 0) is None
    assert read(70, 32 * 50) is None  # as many more as the file has bytes for
    for pairs, behind in ((60, 0), (80, 32 * 1000)):
        with pytest.raises(CheckpointError, match="steps, which no trainer writes"):
            read(pairs, behind)
