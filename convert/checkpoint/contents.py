"""What a file holds beside and inside a state_dict: tensors, adapters of languages, dictionaries; bounded by the file's size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.checkpoint.constructors import shared
from convert.checkpoint.container import Container, tensors_in
from convert.checkpoint.dictionary import Dictionary, from_pickle, from_symbols, is_dictionary
from convert.checkpoint.stacks import is_unstacked, stacked, unstack
from convert.checkpoint.stored import StoredTensor, Stub
from convert.errors import CheckpointError

Parts = Mapping[Any, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """Further tensors of a checkpoint, such as one language's adapter of an MMS file.

    Args:
        tensors: where each tensor is.
        dictionary: the target dictionary that belongs to them, or `None`.
    """

    tensors: dict[str, StoredTensor]
    dictionary: Dictionary | None


@dataclass(slots=True)
class Room:
    """How much a file of its size can hold: what stands in a pickle once may be named in it a million times.

    Args:
        name: the file's name, for errors.
        tensors: how many more tensors, adapters that are stacked counted one by one.
        letters: how many more letters of dictionaries.
    """

    name: str
    tensors: int
    letters: int

    def take(self, tensors: int = 0, letters: int = 0) -> None:
        """Use some of it.

        Raises:
            CheckpointError: `size-bomb`, when there is not so much.
        """
        self.tensors -= tensors
        self.letters -= letters
        if self.tensors < 0 or self.letters < 0:
            what = "tensors" if self.tensors < 0 else "symbols"
            raise CheckpointError(
                f"{self.name}: it names more {what} than a file of its size holds; nothing was written",
                code="size-bomb",
                key=self.name,
                hint="get the checkpoint from its author again: no trainer writes such files",
            )


def read_tensors(model: Parts, room: Room) -> dict[str, StoredTensor]:
    """Take the tensors of a state_dict; adapters that are stacked for several languages one by one."""
    found = {name: value for name, value in model.items() if isinstance(value, StoredTensor)}
    room.take(tensors=sum(max(1, stacked(name, tensor.shape)) for name, tensor in found.items()))
    strange = next((name for name in found if is_unstacked(name)), None)
    if strange is not None:
        raise CheckpointError(
            f"{room.name}: its model names a tensor {strange}, a name that is reserved for adapters",
            code="corrupted-model",
            key=strange,
        )
    return unstack(found, lambda tensor: tensor.shape, _row)


def _row(tensor: StoredTensor, index: int) -> StoredTensor:
    offset = tensor.offset + index * tensor.stride[0]
    return StoredTensor(tensor.storage, offset, shared(tensor.shape[1:]), shared(tensor.stride[1:]))


def holds_numbers(value: object, name: str) -> bool:
    """Say whether an entry of a state_dict may be weights: whether tensors, or arrays of numpy, are in it.

    Args:
        value: the entry.
        name: the file's name, for errors.
    """
    return is_array(value) or any(True for _ in tensors_in(value, name))


def is_array(value: object) -> bool:
    """Say whether a value is a pickled array of numpy."""
    return isinstance(value, Stub) and value.type.module.partition(".")[0] == "numpy"


def read_groups(holders: Iterable[Parts], room: Room) -> dict[str, Group]:
    """Take `adapter`, which the MMS files hold, out of its holder: language -> its tensors and its dictionary."""
    found: dict[Any, Any] = next(
        (holder["adapter"] for holder in holders if isinstance(holder.get("adapter"), dict)), {}
    )
    groups = {}
    for language in list(found):
        part = found.pop(language)  # the 300,000 tensors of MMS are not kept twice
        model = part.get("model") if isinstance(part, dict) else None
        strange = not isinstance(language, str) or not re.fullmatch(r"[\w-]{1,80}", language, re.ASCII)
        if strange or not isinstance(model, dict) or not all(map(_is_tensor, model.items())):
            raise CheckpointError(
                f"{room.name}: its adapter of {ascii(language)[:60]} is not a language's tensors; nothing was written",
                code="corrupted-model",
                key=room.name,
            )
        groups[language] = Group(read_tensors(model, room), _dictionary_in(part, room))
    return groups


def _is_tensor(entry: tuple[object, object]) -> bool:
    return isinstance(entry[0], str) and entry[0].isprintable() and isinstance(entry[1], StoredTensor)


def bytes_in(container: Container, value: object) -> int:
    """Count the bytes of the storages that a value names."""
    return sum(
        container.storages[key].count
        for key in {tensor.storage.key for tensor in tensors_in(value, container.path.name)}
    )


def read_dictionary(holders: Iterable[Parts], room: Room) -> Dictionary | None:
    """Find the target dictionary: in `task_state`, where fairseq keeps it, or alone beside the state_dict; the nearest."""
    return next((found for holder in holders if (found := _dictionary_in(holder, room)) is not None), None)


def _dictionary_in(holder: Parts, room: Room) -> Dictionary | None:
    state = holder.get("task_state")
    inside = state.get("target_dictionary") if isinstance(state, dict) else None
    beside = [value for value in holder.values() if is_dictionary(value)]
    return _symbols(inside if inside is not None or len(beside) != 1 else beside[0], room)


def read_dictionaries(holders: Iterable[Parts], room: Room) -> tuple[Dictionary, ...]:
    """Find the dictionaries of a pretraining: in `task_state`, or where s3prl keeps their symbols; the nearest."""
    return next((found for holder in holders if (found := _dictionaries_in(holder, room))), ())


def _dictionaries_in(holder: Parts, room: Room) -> tuple[Dictionary, ...]:
    state, symbols = holder.get("task_state"), holder.get("dictionaries_symbols")
    listed = state.get("dictionaries") if isinstance(state, dict) else None
    if isinstance(symbols, list) and all(map(_is_texts, symbols)):
        room.take(letters=sum(1 + len(symbol) for one in symbols for symbol in one))
        return tuple(from_symbols(one, room.name) for one in symbols)
    found = [_symbols(value, room) for value in listed] if isinstance(listed, list) else []
    whole = [dictionary for dictionary in found if dictionary is not None]
    return tuple(whole) if len(whole) == len(found) else ()


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _symbols(value: object, room: Room) -> Dictionary | None:
    state = value.state if isinstance(value, Stub) and isinstance(value.state, dict) else {}
    symbols = state.get("symbols")
    if isinstance(symbols, list):
        room.take(letters=sum(1 + len(symbol) if isinstance(symbol, str) else 1 for symbol in symbols))
    return from_pickle(value, room.name)
