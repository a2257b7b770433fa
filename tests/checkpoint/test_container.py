"""Every container and storage that torch has written: each tensor that arrives is what torch reads from the file."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_models import save
from safetensors.torch import load_file
from torch_files import change_pickle, entries, read, same, text, write_zip

from convert.checkpoint.stored import Storage, StoredTensor
from convert.checkpoint.unpickle import load
from convert.errors import CheckpointError
from convert.package import compare_weights, convert

QUERY, BIAS = "w2v_encoder.w2v_model.encoder.layers.1.self_attn.q_proj.weight", "w2v_encoder.proj.bias"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the trainer's file holds, as torch reads it."""
    return read(save("ctc_base", tmp_path_factory.mktemp("good") / "good.pt"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_pickle_protocol(container: str, protocol: int, good: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(good, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container == "zip")
    same(path, tmp_path)


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(dtype: torch.dtype, container: str, good: dict[str, Any], tmp_path: Path) -> None:
    model = {key: value.to(dtype) for key, value in good["model"].items()}
    torch.save(good | {"model": model}, tmp_path / "model.pt", _use_new_zipfile_serialization=container == "zip")
    same(tmp_path / "model.pt", tmp_path)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_rounding_is_torchs(source: torch.dtype, target: str, good: dict[str, Any], tmp_path: Path) -> None:
    model = {key: (value * 3).to(source) for key, value in good["model"].items()}
    torch.save(good | {"model": model}, tmp_path / "model.pt")
    done = convert(tmp_path / "model.pt", tmp_path / "model", dtype=target)
    written = load_file(tmp_path / "model" / "model.safetensors")
    for key, name in done.model.plan.renames.items():
        assert torch.equal(written[name], model[key].to(getattr(torch, target)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["ctc_blank_add", "ctc_blank_set"])
def test_edited_rows_in_every_dtype(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = read(save(variant, tmp_path / "model.pt"))
    state["model"] = {key: value.to(dtype) for key, value in state["model"].items()}
    torch.save(state, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "model")
    bias, written = state["model"][BIAS], load_file(tmp_path / "model" / "model.safetensors")["lm_head.bias"]
    expected = bias.float()[0] + 1.5 if variant == "ctc_blank_add" else torch.tensor(-2.5)
    assert torch.equal(written[0], expected.to(dtype))
    assert torch.equal(written[1:], bias[1:])


def _flat(model: dict[str, Any]) -> dict[str, Any]:
    """All parameters as views of one storage, as a flattened optimizer leaves them."""
    flat = torch.cat([value.reshape(-1) for value in model.values()])
    pieces = flat.split([value.numel() for value in model.values()])
    return {key: piece.view_as(value) for (key, value), piece in zip(model.items(), pieces, strict=True)}


def _strided(model: dict[str, Any]) -> dict[str, Any]:
    wide = {key: torch.stack([value, value * 0 + 7], dim=-1) for key, value in model.items()}
    return {key: value[..., 0] for key, value in wide.items()}


# Ways a tensor may lie in its storage: each keeps every number, and changes where it is.
STORAGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "SharedStorage": _flat,
    "Strided": _strided,
    "Transposed": lambda model: {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in model.items()},
    "Offset": lambda model: {k: torch.cat([torch.zeros(5), v.flatten()])[5:].view_as(v) for k, v in model.items()},
    "LargerStorage": lambda model: {
        k: torch.cat([v.flatten(), torch.ones(9)])[:-9].view_as(v) for k, v in model.items()
    },
    "SameTensorTwice": lambda model: model | {QUERY: model[QUERY.replace("q_proj", "k_proj")]},
    "Expanded": lambda model: model | {QUERY: torch.full((1,), 0.5).expand(64, 64)},
    "Parameter": lambda model: {k: torch.nn.Parameter(v) for k, v in model.items()},
    "ParameterWithState": lambda model: {k: _tagged(torch.nn.Parameter(v)) for k, v in model.items()},
    "PlainDict": dict,
}


def _tagged(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    parameter.expert = torch.ones(3)  # type: ignore[attr-defined]  # fairseq marks some parameters
    return parameter


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", STORAGES)
def test_storage(name: str, container: str, good: dict[str, Any], tmp_path: Path) -> None:
    model = STORAGES[name](good["model"])
    torch.save(good | {"model": model}, tmp_path / "model.pt", _use_new_zipfile_serialization=container == "zip")
    same(tmp_path / "model.pt", tmp_path)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_tensors_of_a_gpu(container: str, tmp_path: Path) -> None:
    path = save("ctc_base", tmp_path / "model.pt", container=container)
    change_pickle(path, lambda whole: whole.replace(text("cpu"), text("cuda:1")))
    assert text("cuda:1") in path.read_bytes()
    same(path, tmp_path)


BESIDE: dict[str, Any] = {
    "numpy-scalars": {"best": np.float64(1.5), "steps": np.int64(7), "flag": np.bool_(True), "half": np.float16(0.5)},
    "numpy-array": {"seen": np.arange(5)},
    "scalar-tensor": {"val_loss": torch.tensor(2.5), "empty": torch.zeros(0, 3)},
    "sparse": {"sparse": torch.eye(3).to_sparse()},
    "cycle": {"self": (lambda made: made.append(made) or made)([1])},  # type: ignore[func-returns-value]
    "sets": {"a": {1, 2}, "b": frozenset({"x"}), "c": slice(1, 2)},
    "numbers-as-keys": {"state": {0: {"step": 1}, (1, "a"): 2, None: 3, 1.5: 4, b"x": 5}},
    "text": {"a": "\u00e4\U0001f600\n", "b": b"\xff", "c": bytearray(b"\xff"), "d": 1 << 70},
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_beside_the_model(name: str, container: str, good: dict[str, Any], tmp_path: Path) -> None:
    state = good | {"extra_state": BESIDE[name]}
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=container == "zip")
    same(tmp_path / "model.pt", tmp_path)


def test_metadata_of_a_state_dict(good: dict[str, Any], tmp_path: Path) -> None:
    model = OrderedDict(good["model"])
    model._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    torch.save(good | {"model": model}, tmp_path / "model.pt")
    same(tmp_path / "model.pt", tmp_path)


# Zip files that torch would not write: content of the file -> code
def _zip(name: str, data: bytes = b"x") -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, data)

    return change


def _again(path: Path, **options: Any) -> None:
    content = entries(path)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in content.items():
            archive.writestr(f"archive/{name}", data)


def _overlapping(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    seven = next(i for i in at if data[i + 46 :].startswith(b"archive/data/7"))
    eight = next(i for i in at if data[i + 46 :].startswith(b"archive/data/8"))
    data[eight + 16 : eight + 28] = data[seven + 16 : seven + 28]  # CRC and sizes
    data[eight + 42 : eight + 46] = data[seven + 42 : seven + 46]  # offset
    path.write_bytes(data)


ZIPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "parent": (_zip("archive/../../evil"), "hostile-zip"),
    "absolute": (_zip("/evil"), "hostile-zip"),
    "backslash": (_zip("archive\\..\\evil"), "hostile-zip"),
    "second-pickle": (_zip("other/data.pkl", b"N."), "foreign-file"),
    "torchscript": (_zip("archive/constants.pkl", b"N."), "foreign-file"),
    "big-endian": (_zip("archive/byteorder", b"big"), "byteorder"),
    "bzip2": (lambda path: _again(path, compression=zipfile.ZIP_BZIP2), "compressed-entry"),
    "overlapping": (_overlapping, "hostile-zip"),
    "no-pickle": (lambda path: path.write_bytes(path.read_bytes().replace(b"data.pkl", b"data.plk")), "foreign-file"),
    "twice": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"archive/data/7", b"archive/data/8")),
        "corrupted-zip",
    ),
    "prepended": (lambda path: path.write_bytes(b"#!/bin/sh\n" + path.read_bytes()), "foreign-file"),
    "header-gone": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05", 3)),
        "foreign-file",
    ),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ZIPS)
def test_zip_that_torch_would_not_write(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(good, path)
    content = {key: data for key, data in entries(path).items() if key != "byteorder"}
    write_zip(path, content)
    ZIPS[name][0](path)
    with pytest.raises(CheckpointError) as raised:
        convert(path, tmp_path / "model")
    assert raised.value.code == ZIPS[name][1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("how", ["comment", "zip64", "other-folder", "more-entries"])
def test_zip_that_torch_reads(how: str, good: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(good, path)
    content = entries(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"made by hand" if how == "comment" else b""
        for name, data in (content | ({".data/serialization_id": b"1"} if how == "more-entries" else {})).items():
            folder = "checkpoint_best" if how == "other-folder" else "archive"
            with archive.open(f"{folder}/{name}", "w", force_zip64=how == "zip64") as entry:
                entry.write(data)
    convert(path, tmp_path / "model")
    assert compare_weights(path, tmp_path / "model") == []


def _tensor(offset: bytes, shape: bytes, stride: bytes, count: bytes = b"K\x06", more: bytes = b"") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + count + more + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor\n(" + storage + offset + shape + stride + b"tR."


def test_tensor_and_view() -> None:
    shape, stride = b"K\x02K\x03\x86", b"K\x03K\x01\x86"
    assert load(_tensor(b"K\0", shape, stride), 0, "x").value == StoredTensor(
        Storage("0", "FloatStorage", 6), 0, (2, 3), (3, 1)
    )
    view = b"(" + text("1") + b"K\x02K\x04t"
    found = load(_tensor(b"K\x01", b"K\x03\x85", b"K\x01\x85", more=view), 0, "x").value
    assert found == StoredTensor(Storage("0", "FloatStorage", 6, 2), 3, (3,), (1,))


BAD_TENSORS = {
    "Boolean": _tensor(b"K\0", b"\x88\x85", b"K\x01\x85"),
    "BooleanCount": _tensor(b"K\0", b"K\x01\x85", b"K\x01\x85", count=b"\x88"),
    "Text": _tensor(b"K\0", text("6") + b"\x85", b"K\x01\x85"),
    "TextAsShape": _tensor(b"K\0", text("66"), text("11")),
    "Fraction": _tensor(b"K\0", b"G@\x08\0\0\0\0\0\0\x85", b"K\x01\x85"),
    "Negative": _tensor(b"K\0", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
    "NegativeStride": _tensor(b"K\x05", b"K\x06\x85", b"J\xff\xff\xff\xff\x85"),
    "NegativeOffset": _tensor(b"J\xff\xff\xff\xff", b"K\x06\x85", b"K\x01\x85"),
    "NegativeCount": _tensor(b"K\0", b"K\x06\x85", b"K\x01\x85", count=b"J\xff\xff\xff\xff"),
    "TooLong": _tensor(b"K\0", b"K\x07\x85", b"K\x01\x85"),
    "TooFar": _tensor(b"K\x01", b"K\x06\x85", b"K\x01\x85"),
    "TooWide": _tensor(b"K\0", b"K\x06\x85", b"K\x02\x85"),
    "Huge": _tensor(b"K\0", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85", b"K\0\x85"),
    "StridesMissing": _tensor(b"K\0", b"K\x06\x85", b")"),
    "ManyAxes": _tensor(b"K\0", b"(" + b"K\x01" * 65 + b"t", b"(" + b"K\x01" * 65 + b"t"),
    "ViewTooLong": _tensor(b"K\0", b"K\x01\x85", b"K\x01\x85", more=b"(" + text("1") + b"K\x03K\x04t"),
    "ViewOfNothing": _tensor(b"K\0", b"K\x01\x85", b"K\x01\x85", more=text("1")),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_impossible_tensor(name: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        load(BAD_TENSORS[name], 0, "x.pt")
    assert raised.value.code == "corrupted-pickle"


def test_storage_of_two_types(good: dict[str, Any], tmp_path: Path) -> None:
    whole = b"\x80\x02(" + _tensor(b"K\0", b"K\x06\x85", b"K\x01\x85")[2:-1]
    whole += _tensor(b"K\0", b"K\x06\x85", b"K\x01\x85")[2:-1].replace(b"Float", b"Double") + b"t."
    with pytest.raises(CheckpointError, match="a storage of two types or sizes"):
        load(whole, 0, "x.pt")
