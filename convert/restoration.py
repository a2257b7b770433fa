"""The way back: from a Hugging Face model directory to a checkpoint that fairseq's own loader takes."""

from __future__ import annotations

import functools
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.checkpoint.container import Container
from convert.checkpoint.stored import StoredTensor
from convert.checkpoint.writer import Lazy, NewTensor, counting, write_checkpoint
from convert.conversion import File, Record, differences
from convert.directory import ModelDirectory
from convert.draft import Draft, loadable, stored
from convert.errors import MismatchError, PlanError, Problem
from convert.families import ARCHITECTURES, Family, describe
from convert.families.base import NO_HEAD, Kind
from convert.files import WIDTHS, check_file, new_file, sha256_of
from convert.report import Progress, counted
from convert.request import request_again
from convert.saved import from_config


@dataclass(frozen=True, slots=True)
class Restored:
    """A finished restoration.

    Args:
        path: the checkpoint.
        tensors: how many it holds.
        notes: what was made or changed on the way, for models that fairseq did not make.
    """

    path: Path
    tensors: int
    notes: tuple[str, ...]


def restore(
    model_dir: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Restored:
    """Write a fairseq checkpoint from a Hugging Face model directory.

    Args:
        model_dir: a directory that this tool made (settings from `conversion.json`), or one that transformers saved
            (settings from `config.json`, vocabulary from `vocab.json`).
        out: the checkpoint to write.
        overwrite: whether an existing file is replaced, once the new one is proved.
        progress: called with (bytes done, bytes in all): each is hashed, written and compared.

    Returns:
        What was written. Every tensor was read back and compared byte for byte with the model's.

    Raises:
        ConvertError: `not-a-model`, `exists`.
        PlanError: the model has no fairseq counterpart; every reason is in `problems`.
    """
    out = Path(out)
    directory = ModelDirectory(Path(model_dir))
    check_file(out, overwrite)
    ours = os.path.lexists(directory.path / "conversion.json")
    hashed = sum(file.size for file in directory.record.files.values()) if ours else 0
    draft = _from_conversion(directory, counted(progress, 3 * hashed)) if ours else from_config(directory)
    model = draft.stacked
    restoring = draft.restoring
    teacher = {restoring.teacher: {name: model[key] for name, key in draft.teacher.items()}} if draft.teacher else {}
    history = {"criterion_name": "", "optimizer_name": "", "num_updates": 0, "best_loss": None}
    state: dict[str, Any] = {"args": None, "cfg": None, "criterion": None, "optimizer_history": [history]}
    state |= draft.settings
    state["task_state"] = {} if draft.dictionary is None else {"target_dictionary": draft.dictionary}
    state["task_state"] |= {"dictionaries": list(draft.dictionaries)} if draft.dictionaries else {}
    state |= {"extra_state": {}, "last_optimizer_state": None}
    if draft.languages:
        state["adapter"] = Lazy(draft.languages, lambda name: _adapter(draft.languages[name]))
    if restoring.bare:
        state = draft.settings
    advance = counted(progress, hashed + 2 * draft.size if progress else 0, hashed)
    with new_file(out, overwrite=overwrite) as path:
        write_checkpoint(path, {**model, **teacher}, state, advance)
        _prove(path, draft, directory if ours else None, advance)
    return Restored(out, len(model), tuple(draft.notes))


def _adapter(language: Draft) -> dict[str, Any]:
    return {"model": language.stacked, "task_state": {"target_dictionary": language.dictionary}}


def _prove(path: Path, draft: Draft, directory: ModelDirectory | None, advance: Callable[[int], None]) -> None:
    """Read the checkpoint back with the reader that knows nothing of the writer, and compare every byte.

    Args:
        path: the checkpoint.
        draft: what it was made from.
        directory: the directory that a conversion made: a conversion of the checkpoint has to give its settings again.
        advance: called with numbers of bytes that were compared.
    """
    with open_checkpoint(path) as opened:
        if directory is not None:
            _compare_settings(opened, directory)
        _compare(opened, "", draft, advance)
        for name, language in draft.languages.items():
            _compare(opened, name, language, advance)


def _compare(opened: Checkpoint, group: str, draft: Draft, advance: Callable[[int], None]) -> None:
    found = {name: (spec.shape, spec.dtype) for name, spec in opened.inventory_of(group).items()}
    if found != {name: (tensor.shape, tensor.dtype) for name, tensor in draft.tensors.items()}:
        raise MismatchError(f"{opened.path.name} read back with other tensors; nothing was kept", code="read-back")
    for name, tensor in opened.tensors_of(group).items():
        if not _holds(opened.container, tensor, counting(draft.tensors[name].pieces(), advance)):
            raise MismatchError(f"{name} read back differently; nothing was kept", code="read-back", key=name)


def _holds(container: Container, tensor: StoredTensor, pieces: Iterable[bytes]) -> bool:
    """Say whether a tensor's bytes are these."""
    width = container.dtype(tensor)[1]
    at = container.storages[tensor.storage.key].start + width * tensor.offset
    end = at + width * math.prod(tensor.shape)
    for piece in pieces:
        if os.pread(container.file.fileno(), len(piece), at) != piece:
            return False
        at += len(piece)
    return at == end and tensor.is_contiguous


def _compare_settings(opened: Checkpoint, directory: ModelDirectory) -> None:
    """Plan the conversion again: settings that it refuses, or makes something else of, are not those of a conversion."""
    again = replace(opened, settings=dict(directory.record.settings))  # as they were, the criterion's with them
    request = request_again(directory, again)
    if request.data_config is None:  # of several adapters, the one that was taken is now the model's own
        request = replace(request, language="")
    meant = describe(again, request).configuration
    if directory.record.dtype != "keep":
        meant["torch_dtype"] = directory.record.dtype
    problems = list(differences("config.json", meant, directory.config))
    if problems:
        raise PlanError(
            f"{directory.path}: conversion.json and config.json disagree about the model; nothing was written",
            code="changed",
            problems=problems,
            hint="convert the checkpoint again",
        )


def _from_conversion(directory: ModelDirectory, advance: Callable[[int], None]) -> Draft:
    record = directory.record
    family, kind = _known(record)
    if not family.restores:
        name = record.architecture.fairseq
        raise PlanError(
            f"{directory.path} was made from {name}, to which there is no way back; nothing was written",
            code="unsupported-architecture",
            key=name,
            hint="keep the checkpoint that it was made from",
        )
    constants = {drop.key: drop.constant for drop in record.drops if drop.constant is not None}
    kept = {source for sidecar in record.sidecars.values() for source in sidecar.tensors.values()}
    repeated = {drop.key: drop.repeats for drop in record.drops if drop.repeats}
    relics = {drop.key for drop in record.drops if drop.relic}
    kept |= repeated.keys() | constants.keys() | relics | {family.restoring.teacher}
    problems = [Problem("dropped", drop.key, drop.reason) for drop in record.drops if drop.key not in kept]
    if problems:
        asked = all(problem.detail == NO_HEAD for problem in problems)
        head = "pretraining" if "w2v_args" not in record.settings["model"] else "ctc"
        way = f"with its head (--head {head}, or no --head at all)" if asked else "with --keep-final-proj"
        raise PlanError(
            f"{directory.path} lacks tensors that fairseq's model needs; nothing was written",
            code="dropped",
            problems=problems,
            hint=f"convert the checkpoint again {way}",
        )
    notes = _changed(directory, record.files, advance)
    notes += family.restoring.notes
    settings = (family.restoring.settings or loadable)(record.settings)
    dictionary = None if kind.data_config else record.dictionary
    draft = Draft({}, settings, dictionary, notes, record.dictionaries, restoring=family.restoring)
    made = {fill.key for fill in record.fills}
    lost = list(made ^ record.tensors.keys() ^ directory.tensors.keys())
    for file, sidecar in record.sidecars.items():
        lost += [f"{file}: {target}" for target in sidecar.tensors.keys() - directory.places(file).keys()]
    lost += [source for source in repeated.values() if source not in record.tensors.values()]
    if lost:
        problems = [Problem("changed", key, "conversion.json and the weights disagree about it") for key in lost]
        raise PlanError(f"{directory.path} was changed since its conversion", code="changed", problems=problems)
    draft.tensors = {
        source: _as_it_was(stored(directory, directory.tensors[target]), target, record)
        for target, source in record.tensors.items()
    }
    groups: dict[str, list[str]] = {}
    for file, sidecar in record.sidecars.items():
        groups.setdefault(sidecar.group, []).append(file)
    draft.tensors |= _beside(directory, groups.pop("", []))
    draft.languages = Lazy(
        groups, lambda name: Draft(_beside(directory, groups[name]), {}, record.languages.get(name), notes)
    )
    for source, other in repeated.items():
        draft.tensors[source] = replace(draft.tensors[other])
    for key, number in constants.items():
        draft.tensors[key] = NewTensor("F32", (1,), functools.partial(list, [struct.pack("<f", number)]))
    for old, new in family.restoring.renamed.items():
        for key in [key for key in draft.tensors if key.startswith(old)]:
            draft.tensors[new + key.removeprefix(old)] = draft.tensors.pop(key)
    draft.teacher = family.restoring.taught(draft.tensors, record.settings["model"])
    return draft


def _beside(directory: ModelDirectory, files: Iterable[str]) -> dict[str, NewTensor]:
    """The tensors of further files, which stand there as the checkpoint had them."""
    made = {}
    for file in files:
        places = directory.places(file)
        for target, source in directory.record.sidecars[file].tensors.items():
            made[source] = stored(directory, places[target])
    return made


def _known(record: Record) -> tuple[Family, Kind]:
    """Find the family that declares a record's architecture, and the kind of checkpoint."""
    name = record.architecture.fairseq
    if name not in ARCHITECTURES:
        raise PlanError(f"{name}: not an architecture that is converted", code="unsupported-architecture", key=name)
    return ARCHITECTURES[name]


def _as_it_was(tensor: NewTensor, target: str, record: Record) -> NewTensor:
    """Put back the rows of a tensor of the weights that the conversion edited, and those that it left out, before the others."""
    edited, left = record.edited_rows.get(target, {}), bytes.fromhex(record.left_rows.get(target, ""))
    if not edited and not left:
        return tensor

    def pieces() -> Iterator[bytes]:
        data = bytearray(b"".join(tensor.pieces()))
        for row, text in edited.items():
            old = bytes.fromhex(text)
            data[int(row) * len(old) : (int(row) + 1) * len(old)] = old
        yield left + data

    if not left:
        return replace(tensor, pieces=pieces)
    rows = len(left) // (WIDTHS[tensor.dtype] * max(1, math.prod(tensor.shape[1:])))
    return replace(tensor, shape=(sum(tensor.shape[:1]) + rows, *tensor.shape[1:]), pieces=pieces)


def _changed(directory: ModelDirectory, files: Mapping[str, File], advance: Callable[[int], None]) -> list[str]:
    """Hold the files against conversion.json: other weights are noted, other settings would be lost and are refused."""
    weights = {*directory.weight_files(), *directory.record.sidecars}
    notes, problems = [], []
    for name, kept in files.items():
        path = directory.path / name
        same = path.is_file() and sha256_of(path, lambda piece: advance(len(piece))) == kept.sha256
        if not path.is_file() or (not same and name not in weights):
            problems.append(Problem("changed", name, "is not what the conversion wrote; the settings come from there"))
        elif not same:
            notes.append(f"{name} is not what the conversion wrote: its weights were restored as they are now")
    if problems:
        raise PlanError(
            f"{directory.path} was changed since its conversion; nothing was written",
            code="changed",
            problems=problems,
            hint="for a model that was trained on with transformers, remove conversion.json: then config.json counts",
        )
    return notes
