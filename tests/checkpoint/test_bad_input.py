"""What is not a good checkpoint, and what is not a good place to write: one clear error, and nothing written."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_models import dictionary, save
from torch_files import entries, write_zip

from convert.errors import ConvertError
from convert.package import compare_weights, convert, plan

PREFIX = "w2v_encoder.w2v_model."
QUERY = f"{PREFIX}encoder.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    return {kind: save("ctc_base", folder / f"{kind}.pt", container=kind) for kind in ("zip", "legacy")}


@pytest.fixture(scope="module")
def good(checkpoints: dict[str, Path]) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoints["zip"], weights_only=False)
    return state


def refused(path: Path, folder: Path, **options: Any) -> ConvertError:
    before, threads = sorted(folder.iterdir()), threading.active_count()
    with pytest.raises(ConvertError) as raised:
        convert(path, folder / "model", **options)
    assert sorted(folder.iterdir()) == before
    assert threading.active_count() == threads
    return raised.value


def test_good_files_convert(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for kind, path in checkpoints.items():
        convert(path, tmp_path / kind)
        assert compare_weights(path, tmp_path / kind) == []


# Files that are something else: content -> code and what the message says
OTHER_FILES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "empty-file", "is empty"),
    "one-byte": (b"\x80", "corrupted-pickle", "the pickle cannot be read"),
    "zeros": (bytes(4096), "foreign-file", "begins with the bytes 00 00 00 00, as no file of torch.save"),
    "text": (b"wav2vec_small.pt 950500491\n", "foreign-file", "is a text file"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "foreign-file", "is a web page: the download failed"),
    "safetensors": (struct.pack("<Q", 8) + b'{"a": 1}', "truncated", "is a damaged or truncated safetensors file"),
    "no-tensors": (struct.pack("<Q", 8) + b"{}      ", "foreign-file", "holds an empty dict"),
    "pickle": (b"\x80\x02}q\x00.", "foreign-file", "is a pickle that torch.save did not write"),
    "tar": (b"storages\0" + bytes(248) + b"ustar" + bytes(250), "foreign-file", "is a tar archive"),
    "zip-head": (b"PK\x03\x04" + bytes(100), "truncated", "is a truncated or damaged zip file"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_file(name: str, tmp_path: Path) -> None:
    content, code, message = OTHER_FILES[name]
    (tmp_path / "other.pt").write_bytes(content)
    error = refused(tmp_path / "other.pt", tmp_path)
    assert (error.code, error.status) == (code, 2)
    assert error.message.startswith("other.pt")
    assert message in error.message
    assert error.hint


# Torch files that are no checkpoint of a supported model -> code and status
OTHER_OBJECTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, int]] = {
    "transformers-bin": (lambda good: {"wav2vec2.masked_spec_embed": torch.zeros(4)}, "foreign-file", 2),
    "bare-state-dict": (lambda good: good["model"], "no-settings", 2),
    "module": (lambda good: torch.nn.Linear(2, 2), "foreign-file", 2),
    "list": (lambda good: [*good], "foreign-file", 2),
    "tensor": (lambda good: torch.zeros(3), "foreign-file", 2),
    "no-settings": (lambda good: good | {"cfg": None}, "no-settings", 2),
    "no-tensors": (lambda good: good | {"model": {}}, "no-tensors", 2),
    "shard": (lambda good: good | {"shard_metadata": {"a": 1}}, "shard", 2),
    "language-model": (
        lambda good: good | {"cfg": good["cfg"] | {"model": {"_name": "transformer_lm"}}},
        "unsupported-architecture",
        1,
    ),
    "number-as-name": (lambda good: good | {"model": good["model"] | {3: torch.zeros(1)}}, "corrupted-model", 2),
    "surrogate-in-name": (lambda good: good | {"model": {"\ud800": torch.zeros(1)}}, "corrupted-model", 2),
    "complex-tensor": (
        lambda good: good | {"model": good["model"] | {"a": torch.zeros(1, dtype=torch.complex64)}},
        "unsupported-dtype",
        2,
    ),
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", OTHER_OBJECTS)
def test_other_object(name: str, container: str, good: dict[str, Any], tmp_path: Path) -> None:
    change, code, status = OTHER_OBJECTS[name]
    torch.save(change(good), tmp_path / "other.pt", _use_new_zipfile_serialization=container == "zip")
    error = refused(tmp_path / "other.pt", tmp_path)
    assert (error.code, error.status) == (code, status)


def test_directory_missing_pipe_and_device(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    found = {name: refused(tmp_path / name, tmp_path).code for name in ("folder", "missing", "pipe")}
    assert found == {"folder": "directory", "missing": "missing-file", "pipe": "not-a-file"}
    assert refused(Path(os.devnull).with_name("zero"), tmp_path).code == "not-a-file"


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_truncated_anywhere(container: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data, path = checkpoints[container].read_bytes(), tmp_path / "truncated.pt"
    points = [*range(0, 64, 7), *range(64, len(data), len(data) // 40), *range(len(data) - 40, len(data), 3)]
    codes = set()
    for count in points:
        path.write_bytes(data[:count])
        error = refused(path, tmp_path)
        assert error.status == 2
        codes.add(error.code)
    assert codes <= {"truncated", "empty-file", "foreign-file", "corrupted-pickle"}
    assert "truncated" in codes


@pytest.mark.parametrize("entry", ["data.pkl", "data/0", "data/7", "data/20"])
def test_damaged_entry_is_caught_by_its_crc(entry: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data, piece = bytearray(checkpoints["zip"].read_bytes()), entries(checkpoints["zip"])[entry]
    data[data.index(piece) + len(piece) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(data)
    error = refused(tmp_path / "damaged.pt", tmp_path)
    assert error.code == "corrupted-entry"
    assert f"/{entry} is damaged: its CRC-32 is wrong" in error.message


def test_missing_storage(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    content = entries(checkpoints["zip"])
    del content["data/7"]
    error = refused(write_zip(tmp_path / "missing.pt", content), tmp_path)
    assert error.code == "truncated"
    assert "storage 7" in error.message


# Changes of the model's tensors -> the codes of the problems; RANK is what the mapping does not take yet
TENSORS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "missing": ({QUERY: None}, {"missing-tensor"}),
    "missing-layer": ({f"{PREFIX}layer_norm.weight": None}, {"missing-tensor"}),
    "extra": ({f"{PREFIX}encoder.extra.weight": torch.zeros(2)}, {"unexpected-tensor"}),
    "extra-layer": ({f"{PREFIX}encoder.layers.7.fc1.weight": torch.zeros(96, 64)}, {"unexpected-tensor"}),
    "shape": ({QUERY: torch.zeros(64, 63)}, {"shape"}),
    "transposed": ({f"{PREFIX}encoder.layers.1.fc1.weight": torch.zeros(64, 96)}, {"shape"}),
    "no-elements": ({QUERY: torch.zeros(0, 64)}, {"shape"}),
    "whole-numbers": ({QUERY: torch.zeros(64, 64, dtype=torch.long)}, {"dtype"}),
    "no-tensor": ({QUERY: 1.0}, {"missing-tensor"}),
    "sparse": ({QUERY: torch.zeros(64, 64).to_sparse()}, {"missing-tensor", "unexpected-tensor"}),
    "nan": ({QUERY: torch.full((64, 64), torch.nan)}, {"non-finite"}),
    "infinite": ({QUERY: torch.zeros(64, 64).index_fill(0, torch.tensor([3]), -torch.inf)}, {"non-finite"}),
    "nan-half": ({QUERY: torch.full((64, 64), torch.nan).half()}, {"non-finite"}),
}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    change, codes = TENSORS[name]
    model = {key: value for key, value in (good["model"] | change).items() if value is not None}
    torch.save(good | {"model": model}, tmp_path / "wrong.pt")
    error = refused(tmp_path / "wrong.pt", tmp_path)
    assert error.status == 1
    assert {problem.code for problem in error.problems} == codes


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", ["keep", "float16", "bfloat16"])
def test_non_finite_is_kept_when_asked_for(value: float, dtype: str, good: dict[str, Any], tmp_path: Path) -> None:
    torch.save(good | {"model": good["model"] | {QUERY: torch.full((64, 64), value)}}, tmp_path / "nan.pt")
    assert refused(tmp_path / "nan.pt", tmp_path, dtype=dtype).code == "non-finite"
    convert(tmp_path / "nan.pt", tmp_path / "model", dtype=dtype, allow_non_finite=True)
    assert compare_weights(tmp_path / "nan.pt", tmp_path / "model") == []


def test_overflow_of_half_precision_is_refused(good: dict[str, Any], tmp_path: Path) -> None:
    torch.save(good | {"model": good["model"] | {QUERY: torch.full((64, 64), 1e30)}}, tmp_path / "large.pt")
    assert refused(tmp_path / "large.pt", tmp_path, dtype="float16").code == "non-finite"
    convert(tmp_path / "large.pt", tmp_path / "model", dtype="bfloat16")


DICTIONARIES: dict[str, tuple[bytes, str]] = {
    "other-symbols": (b"A 1\nB 1\n", "refused"),
    "no-count": (b"A 1\nB\n", "bad-dictionary"),
    "superscript-count": ("A ²\n".encode(), "bad-dictionary"),
    "long-count": (b"A " + b"9" * 5000, "bad-dictionary"),
    "twice": (b"A 1\nA 1\n", "bad-dictionary"),
    "not-text": (b"\xff\xfe", "bad-dictionary"),
}


@pytest.mark.parametrize("name", DICTIONARIES)
def test_wrong_dictionary(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    content, code = DICTIONARIES[name]
    (tmp_path / "dict.txt").write_bytes(content)
    assert refused(checkpoints["zip"], tmp_path, dictionary=tmp_path / "dict.txt").code == code


def test_missing_dictionary_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert refused(checkpoints["zip"], tmp_path, dictionary=tmp_path / "dict.txt").code == "bad-dictionary"


def test_right_dictionary(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    dictionary().save(str(tmp_path / "dict.txt"))
    assert plan(checkpoints["zip"], dictionary=tmp_path / "dict.txt").dictionary is not None


def test_surrogate_in_settings_is_kept_readable(good: dict[str, Any], tmp_path: Path) -> None:
    task = good["cfg"]["task"] | {"data": "name-\udcff"}  # how Python reads a file name that is not UTF-8
    torch.save(good | {"cfg": good["cfg"] | {"task": task}}, tmp_path / "name.pt")
    convert(tmp_path / "name.pt", tmp_path / "model")
    assert '"name-?"' in (tmp_path / "model" / "conversion.json").read_text("utf-8")


def test_file_name_that_is_no_text(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"model-\xff.pt")
    path.write_bytes(checkpoints["zip"].read_bytes())
    convert(path, tmp_path / "model")
    assert compare_weights(path, tmp_path / "model") == []


def _tensor(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["model"].update({name: torch.zeros(shape)})


def _setting(section: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["cfg"][section].update({name: value})


# Found here, to be mended in convert.families: each is a traceback, or takes all memory.
GAPS: dict[str, Callable[[dict[str, Any]], None]] = {
    "axes-of-fc1": _tensor(f"{PREFIX}encoder.layers.0.fc1.weight", (5,)),
    "axes-of-a-convolution": _tensor(f"{PREFIX}feature_extractor.conv_layers.0.0.weight", (5,)),
    "axes-of-pos-conv": _tensor(f"{PREFIX}encoder.pos_conv.0.weight_v", (5,)),
    "axes-of-the-heads-bias": _tensor("w2v_encoder.proj.bias", ()),
    "number-of-5000-digits": _tensor(f"{PREFIX}encoder.layers.{'9' * 5000}.fc1.weight", (96, 64)),
    "list-as-post-process": _setting("criterion", "post_process", ["letter"]),
    "list-as-blank-weight": _setting("model", "blank_weight", [1.0]),
}


@pytest.mark.parametrize("name", GAPS)
def test_wrong_types_and_axes(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(checkpoints["zip"], weights_only=False)
    GAPS[name](state)
    torch.save(state, tmp_path / "wrong.pt")
    assert refused(tmp_path / "wrong.pt", tmp_path).status == 1
