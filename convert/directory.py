"""A Hugging Face model directory as it lies on the disk: its records, and the byte range of every tensor."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.data_config import DataConfig
from convert.conversion import NAME as RECORD
from convert.conversion import Record
from convert.errors import ConvertError, Problem
from convert.families.tokenizers import SUBWORDS
from convert.files import WIDTHS, read_header
from convert.pieces import Piece, tensor_bytes
from convert.reading import open_file, read_file
from convert.report import parse_json
from convert.rules import TensorSpec

_REMEDY = "convert the checkpoint again"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: its file, its first byte, and what it is."""

    file: str
    start: int
    count: int
    spec: TensorSpec


class ModelDirectory:
    """Reads a model directory.

    Args:
        path: the directory.

    Raises:
        ConvertError: `not-a-model`, when it is none, or a file in it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise self._error("is not a directory", "name the directory that `fairseq-to-hf convert` made")
        self.config: dict[str, Any] = self.json("config.json")
        self.tensors = self._tensors()

    @functools.cached_property
    def record(self) -> Record:
        """What conversion.json says, read once."""
        self._there(RECORD)
        return Record.of(read_file(self.path / RECORD))

    @property
    def data_config(self) -> DataConfig | None:
        """The config.yaml of a speech-to-text model's task, as conversion.json keeps it, with the files that it names."""
        values, dictionary = self.record.asked.data_config, self.record.dictionary
        if values is None or dictionary is None:
            return None
        subwords = self.path / SUBWORDS
        return DataConfig(values, dictionary, read_file(subwords) if subwords.is_file() else b"")

    @property
    def architecture(self) -> str:
        """The class that config.json names; empty where it names none."""
        named = self.config.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""

    def json(self, name: str) -> dict[str, Any]:
        """Read one of its JSON files."""
        self._there(name)
        try:
            value = parse_json(read_file(self.path / name), name)
        except ConvertError as error:
            raise self._error(f"holds a damaged {error.message}", _REMEDY) from None
        if not isinstance(value, dict):
            raise self._error(f"holds a {name} that is no JSON object", _REMEDY)
        return value

    def weight_files(self) -> list[str]:
        """List the safetensors files, in order."""
        if (self.path / "model.safetensors.index.json").is_file():
            names = self.json("model.safetensors.index.json").get("weight_map")
            if not isinstance(names, dict):
                raise self._error("holds a model.safetensors.index.json without a weight_map", _REMEDY)
            return sorted({Path(str(name)).name for name in names.values()})
        return ["model.safetensors"]

    def _tensors(self) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for name in self.weight_files():
            for place in self._header(name):
                places[place.spec.name] = place
        return places

    def _header(self, name: str) -> Iterator[Place]:
        self._there(name)
        try:
            with open_file(self.path / name) as file:
                stored, _ = read_header(file)
        except ValueError as error:
            raise self._error(f"holds a damaged {name} ({error})", _REMEDY) from None
        for key, tensor in stored.items():
            yield Place(name, tensor.start, tensor.count, TensorSpec(key, tensor.shape, tensor.dtype))

    def _there(self, name: str) -> None:
        if not (self.path / name).is_file():
            raise self._error(f"has no {name}", "name the directory that `fairseq-to-hf convert` made")

    def read(self, name: str) -> bytes:
        """Return a tensor's bytes."""
        place = self.tensors[name]
        with open_file(self.path / place.file) as file:
            file.seek(place.start)
            return file.read(place.count)

    @property
    def count(self) -> int:
        """The number of its tensors, with those of every file of further tensors that is there."""
        beside = (len(self.places(file)) for file in self.record.sidecars if (self.path / file).is_file())
        return len(self.tensors) + sum(beside)

    def places(self, file: str) -> dict[str, Place]:
        """List the tensors of one safetensors file."""
        return {place.spec.name: place for place in self._header(file)}

    def compare(self, opened: Checkpoint, listed: Sequence[Piece], sidecar: str = "") -> list[Problem]:
        """Compare every tensor with what a conversion would write; see `convert.package.compare_weights`.

        Args:
            opened: the checkpoint.
            listed: what would be written.
            sidecar: the file that is compared; the weights, if it is empty.
        """
        if sidecar and not (self.path / sidecar).is_file():
            return [Problem("missing-file", sidecar, "is not in the model directory")]
        tensors = self.places(sidecar) if sidecar else self.tensors
        meant = {piece.spec.name for piece in listed}
        problems = [Problem("unexpected-tensor", key, "is only in the model") for key in tensors if key not in meant]
        maps: dict[str, mmap.mmap] = {}
        for piece in listed:
            place = tensors.get(piece.spec.name)
            if place is None:
                problems.append(Problem("missing-tensor", piece.spec.name, "is not in the model"))
            elif (place.spec.shape, place.spec.dtype) != (piece.spec.shape, piece.spec.dtype):
                found, expected = f"{place.spec.dtype} {place.spec.shape}", f"{piece.spec.dtype} {piece.spec.shape}"
                problems.append(Problem("shape", piece.spec.name, f"the model has {found}, the checkpoint {expected}"))
            else:
                if place.file not in maps:
                    with open_file(self.path / place.file) as file:
                        maps[place.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                problems += self._differences(opened, piece, place, maps[place.file])
        for data in maps.values():
            data.close()
        return problems

    def _differences(self, opened: Checkpoint, piece: Piece, place: Place, data: mmap.mmap) -> Iterator[Problem]:
        width = WIDTHS[piece.spec.dtype]
        at = place.start
        for meant in tensor_bytes(opened.container, piece):
            found = data[at : at + len(meant)]
            if found != bytes(meant):
                first = next(i for i in range(0, len(found), width) if found[i : i + width] != meant[i : i + width])
                number = (at - place.start + first) // width
                detail = f"element {number} of {place.count // width}: bytes {found[first : first + width].hex()} in the model, "
                detail += f"{bytes(meant[first : first + width]).hex()} in the checkpoint"
                yield Problem("bytes", piece.spec.name, detail)
                return
            at += len(meant)

    def _error(self, what: str, hint: str) -> ConvertError:
        return ConvertError(f"{self.path} {what}", code="not-a-model", key=str(self.path), hint=hint)
