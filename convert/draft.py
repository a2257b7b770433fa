"""What a restoration will write, whatever directory it comes from: tensors, settings and dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from convert.checkpoint.dictionary import Dictionary
from convert.checkpoint.stacks import stack
from convert.checkpoint.writer import NewTensor
from convert.directory import ModelDirectory, Place
from convert.families.base import Restoring
from convert.files import PIECE as CHUNK
from convert.reading import open_file
from convert.rules import TensorSpec


@dataclass(slots=True)
class Draft:
    """What will be written: each tensor with the function that yields its bytes; the adapters of each language likewise.

    `settings`: the entries of the file that hold them. `teacher`: the teacher's name of each tensor that it shares with the
    model -> the model's name.
    """

    specs: dict[str, TensorSpec]
    bytes: dict[str, Callable[[], Iterator[bytes]]]
    settings: dict[str, Any]
    dictionary: Dictionary | None
    notes: list[str]
    dictionaries: tuple[Dictionary, ...] = ()
    languages: dict[str, Draft] = field(default_factory=dict)
    teacher: dict[str, str] = field(default_factory=dict)
    restoring: Restoring = field(default_factory=Restoring)

    def new(self) -> dict[str, NewTensor]:
        """The tensors to write, under fairseq's names: adapters that it stacks are joined."""
        return {key: self._stacked(rows) if rows else self._new(key) for key, rows in stack(self.specs).items()}

    def _new(self, key: str) -> NewTensor:
        return NewTensor(self.specs[key].dtype, self.specs[key].shape, self.bytes[key])

    def _stacked(self, rows: Sequence[str]) -> NewTensor:
        spec = self.specs[rows[0]]
        if len(rows) == 1:
            return NewTensor(spec.dtype, (1, *spec.shape), self.bytes[rows[0]])
        return NewTensor(
            spec.dtype, (len(rows), *spec.shape), lambda: (part for row in rows for part in self.bytes[row]())
        )


def read_place(directory: ModelDirectory, place: Place) -> Iterator[bytes]:
    """Yield a tensor's bytes, a piece at a time."""
    with open_file(directory.path / place.file) as file:
        file.seek(place.start)
        for at in range(0, place.count, CHUNK):
            yield file.read(min(CHUNK, place.count - at))
