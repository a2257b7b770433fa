"""The values of a pickle that is read as data: global names, objects of classes that are not imported, tensors whose bytes are not read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle refers to; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Stub:
    """An object of a class that was not imported: its constructor's arguments, its state, and its items."""

    type: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:  # without its content, which can be endless where objects hold one another many times
        return f"<{self.type}>"


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of numbers in the file: torch's storage, by key.

    Args:
        key: the storage's name in its container.
        type: torch's storage class, such as `FloatStorage`.
        count: the number of elements the pickle claims.
        start: the first element, for the views of very old files.
    """

    key: str
    type: str
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that was not read: a view on a storage, in elements (`torch._utils._rebuild_tensor_v2`)."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors whose rows, one after the other, are this one's."""
        return (self,)

    @property
    def is_contiguous(self) -> bool:
        """Whether its numbers lie one after the other."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and stride != expected:
                return 0 in self.shape
            expected *= length
        return True


@dataclass(frozen=True, slots=True)
class JoinedTensor(StoredTensor):
    """A tensor that was not read, whose rows lie in several files.

    Args:
        pieces: the rows of each file.
    """

    pieces: tuple[StoredTensor, ...]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors whose rows, one after the other, are this one's."""
        return self.pieces
