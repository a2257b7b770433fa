"""What a restoration will write, whatever directory it comes from: tensors, settings and dictionaries."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.checkpoint.dictionary import Dictionary
from convert.checkpoint.stacks import stack
from convert.checkpoint.writer import NewTensor
from convert.directory import ModelDirectory, Place
from convert.families.base import Restoring
from convert.files import PIECE
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
    dictionaries: tuple[Dictionary, ...] = ()
    languages: Mapping[str, Draft] = field(default_factory=dict)
    restoring: Restoring = field(default_factory=Restoring)
    teacher: dict[str, str] = field(default_factory=dict)

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
