"""What a restoration will write, whatever directory it comes from: tensors, settings and dictionaries."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.checkpoint.dictionary import Dictionary
from convert.checkpoint.stacks import stack
from convert.checkpoint.writer import NewTensor
from convert.directory import ModelDirectory, Place
from convert.families import ARCHITECTURES
from convert.families.base import Kind, Restoring
from convert.families.encoder_settings import FINE_TUNING, LAYER_SETTINGS
from convert.files import PIECE, WIDTHS
from convert.reading import open_file


@dataclass(slots=True)
class Draft:
    """What will be written.

    Args:
        tensors: by fairseq's names; adapters that it stacks for several languages one by one.
        settings: the entries of the file that hold them.
        dictionary: the target dictionary.
        notes: what people should know.
        dictionaries: those of a pretraining.
        languages: the adapters of each language likewise.
        restoring: what is particular to the family.
        teacher: the teacher's name of each tensor that it shares with the model -> the model's name.
    """

    tensors: dict[str, NewTensor]
    settings: dict[str, Any]
    dictionary: Dictionary | None
    notes: list[str]
    dictionaries: tuple[Dictionary | None, ...] = ()
    languages: Mapping[str, Draft] = field(default_factory=dict)
    restoring: Restoring = field(default_factory=Restoring)
    teacher: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of all tensors, those of the languages included."""
        own = sum(WIDTHS[tensor.dtype] * math.prod(tensor.shape) for tensor in self.tensors.values())
        return own + sum(language.size for language in self.languages.values())

    @property
    def stacked(self) -> dict[str, NewTensor]:
        """The tensors as they are written: adapters that fairseq stacks are joined."""
        return {key: self._joined(rows) if rows else self.tensors[key] for key, rows in stack(self.tensors).items()}

    def _joined(self, names: Sequence[str]) -> NewTensor:
        rows = [self.tensors[name] for name in names]
        return replace(
            rows[0], shape=(len(rows), *rows[0].shape), pieces=lambda: (piece for row in rows for piece in row.pieces())
        )


def stored(directory: ModelDirectory, place: Place) -> NewTensor:
    """Return a tensor as it lies in a directory."""
    return NewTensor(place.spec.dtype, place.spec.shape, functools.partial(_read, directory.path, place))


def _read(directory: Path, place: Place) -> Iterator[bytes]:
    with open_file(directory / place.file) as file:
        file.seek(place.start)
        for at in range(0, place.count, PIECE):
            yield file.read(min(PIECE, place.count - at))


def loadable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as today's fairseq wants them: a plain `cfg`, whatever layout they came from."""

    def section(values: Mapping[str, Any]) -> dict[str, Any]:
        model = {key: value for key, value in values["model"].items() if key not in ("flat", "w2v_args")}
        if values["model"].get("flat"):  # a Namespace has the options of task, criterion and trainer too
            model = {key: value for key, value in model.items() if key in _of_model(values["model"])}
        if isinstance(values["model"].get("w2v_args"), dict):
            model["w2v_args"] = section(values["model"]["w2v_args"])
            inner = model["w2v_args"]["model"]  # 0.12.2 has them there only: today's defaults would replace its layers
            model = {name: inner[name] for name in LAYER_SETTINGS if inner.get(name) is not None} | model
        task = {"data": "", **values["task"]}
        _, kind = ARCHITECTURES.get(str(model.get("_name")), (None, Kind("")))
        task["_name"] = kind.task
        model |= {"_name": kind.restored} if kind.restored else {}
        if "w2v_args" in values["model"]:
            model.setdefault("data", "")
            model.setdefault("normalize", task.get("normalize", False))
        if kind.label_list and isinstance(task.get("labels"), str):  # in a Namespace, a list's text
            task["labels"] = [label.strip("[]'\" ") for label in task["labels"].split(",")]
        return {"model": model, "task": task, "criterion": None if "w2v_args" not in model else values["criterion"]}

    return {"cfg": {"_name": None, "common": {}, **section(settings)}}


def _of_model(model: Mapping[str, Any]) -> set[str]:
    """Name the settings that belong to a model, by its family, or by that of the encoder in it."""
    inner = model["w2v_args"]["model"] if isinstance(model.get("w2v_args"), dict) else model
    family, kind = ARCHITECTURES[str(inner.get("_name"))]
    fields = family.settings
    known = {"_name", *fields.same, *fields.read, *fields.training_only, *(limit.field for limit in fields.limits)}
    outer = ARCHITECTURES[str(model.get("_name"))][1]
    return known | {*kind.read} | ({*FINE_TUNING, *outer.read, "w2v_path"} if inner is not model else set())
