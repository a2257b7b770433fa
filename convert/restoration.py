"""The way back: from a Hugging Face model directory to a checkpoint that fairseq's own loader takes."""

from __future__ import annotations

import functools
import itertools
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.checkpoint.writer import write_checkpoint
from convert.conversion import File, Record, differences
from convert.directory import ModelDirectory, Place
from convert.draft import Draft, loadable, read_place
from convert.errors import MismatchError, PlanError, Problem
from convert.families import ARCHITECTURES, Family, describe
from convert.families.base import NO_HEAD, Kind
from convert.files import WIDTHS, check_file, new_file, sha256_of
from convert.report import Progress, counted
from convert.request import request_again
from convert.rules import TensorSpec
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
        progress: called with (bytes done, bytes in all): each is written and compared.

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
    draft = _from_conversion(directory) if ours else from_config(directory)
    model = draft.new()
    restoring = draft.restoring
    teacher = {restoring.teacher: {name: model[key] for name, key in draft.teacher.items()}} if draft.teacher else {}
    history = {"criterion_name": "", "optimizer_name": "", "num_updates": 0, "best_loss": None}
    state: dict[str, Any] = {"args": None, "cfg": None, "criterion": None, "optimizer_history": [history]}
    state |= draft.settings
    state["task_state"] = {} if draft.dictionary is None else {"target_dictionary": draft.dictionary}
    state["task_state"] |= {"dictionaries": list(draft.dictionaries)} if draft.dictionaries else {}
    state |= {"extra_state": {}, "last_optimizer_state": None}
    if draft.languages:
        state["adapter"] = {
            name: {"model": part.new(), "task_state": {"target_dictionary": part.dictionary}}
            for name, part in draft.languages.items()
        }
    if restoring.bare:
        state = draft.settings
    count = len(model)
    size = sum(
        WIDTHS[spec.dtype] * math.prod(spec.shape)
        for part in (draft, *draft.languages.values())
        for spec in part.specs.values()
    )
    advance = counted(progress, 2 * size)
    with new_file(out, overwrite=overwrite) as path:
        write_checkpoint(path, {**model, **teacher}, state, advance)
        del model, teacher, state  # of many languages, as much as the draft itself
        _prove(path, draft, directory if ours else None, advance)
    return Restored(out, count, tuple(draft.notes))


def _prove(path: Path, draft: Draft, directory: ModelDirectory | None, advance: Callable[[int], None]) -> None:
    """Read the checkpoint back with the reader that knows nothing of the writer, and compare every byte.

    Args:
        path: the checkpoint.
        draft: what it was made from.
        directory: the directory that a conversion made: a conversion of the checkpoint has to give its settings again.
        advance: called with numbers of bytes that were compared.
    """
    from convert.pieces import read_array

    with open_checkpoint(path) as opened:
        if directory is not None:
            _compare_settings(opened, directory)
        for name, part in {"": draft, **draft.languages}.items():
            if opened.inventory_of(name) != part.specs:
                raise MismatchError(f"{path.name} read back with other tensors; nothing was kept", code="read-back")
            for key, tensor in opened.tensors_of(name).items():
                found = read_array(opened.container, tensor).tobytes()
                if found != b"".join(part.bytes[key]()):
                    raise MismatchError(f"{key} read back differently; nothing was kept", code="read-back", key=key)
                advance(len(found))


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


def _from_conversion(directory: ModelDirectory) -> Draft:
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
    notes = _changed(directory, record.files)
    notes += family.restoring.notes
    settings = (family.restoring.settings or loadable)(record.settings)
    dictionary = None if kind.data_config else record.dictionary
    draft = Draft({}, {}, settings, dictionary, notes, record.dictionaries, restoring=family.restoring)
    made = {fill.key for fill in record.fills}
    lost = list(made ^ record.tensors.keys() ^ directory.tensors.keys())
    for file, sidecar in record.sidecars.items():
        lost += [f"{file}: {target}" for target in sidecar.tensors.keys() - directory.places(file).keys()]
    lost += [source for source in repeated.values() if source not in record.tensors.values()]
    if lost:
        problems = [Problem("changed", key, "conversion.json and the weights disagree about it") for key in lost]
        raise PlanError(f"{directory.path} was changed since its conversion", code="changed", problems=problems)
    _take(draft, directory, directory.tensors, record.tensors, record)
    for file, sidecar in record.sidecars.items():  # what stands in one is as the checkpoint had it
        part = draft
        if sidecar.group:
            own = Draft({}, {}, {}, record.languages.get(sidecar.group), notes)
            part = draft.languages.setdefault(sidecar.group, own)
        _take(part, directory, directory.places(file), sidecar.tensors)
    for source, other in repeated.items():
        draft.specs[source], draft.bytes[source] = replace(draft.specs[other], name=source), draft.bytes[other]
    for key, number in constants.items():
        draft.specs[key] = TensorSpec(key, (1,), "F32")
        draft.bytes[key] = lambda number=number: iter([struct.pack("<f", number)])  # type: ignore[misc]
    for old, new in family.restoring.renamed.items():
        for key in [key for key in draft.specs if key.startswith(old)]:
            name = new + key.removeprefix(old)
            draft.specs[name], draft.bytes[name] = replace(draft.specs.pop(key), name=name), draft.bytes.pop(key)
    draft.teacher = family.restoring.taught(draft.specs, record.settings["model"])
    return draft


def _known(record: Record) -> tuple[Family, Kind]:
    """Find the family that declares a record's architecture, and the kind of checkpoint."""
    name = record.architecture.fairseq
    if name not in ARCHITECTURES:
        raise PlanError(f"{name}: not an architecture that is converted", code="unsupported-architecture", key=name)
    return ARCHITECTURES[name]


def _take(
    draft: Draft,
    directory: ModelDirectory,
    places: Mapping[str, Place],
    tensors: Mapping[str, str],
    record: Record | None = None,
) -> None:
    """Add the tensors of one file; of the weights, with the rows that the conversion edited or left out."""
    for target, name in tensors.items():
        source = sys.intern(name)  # each language has the same names
        spec, read = places[target].spec, functools.partial(read_place, directory, places[target])
        rows = record.edited_rows.get(target) if record else None
        draft.specs[source] = TensorSpec(source, spec.shape, spec.dtype)
        draft.bytes[source] = read if rows is None else _with_rows(read, rows)
        if record and target in record.left_rows:
            _put_before(draft, source, bytes.fromhex(record.left_rows[target]))


def _put_before(draft: Draft, source: str, data: bytes) -> None:
    """Put back the rows that the conversion left out, before the others."""
    spec, read = draft.specs[source], draft.bytes[source]
    rows = len(data) // (WIDTHS[spec.dtype] * math.prod(spec.shape[1:]))
    draft.specs[source] = TensorSpec(source, (spec.shape[0] + rows, *spec.shape[1:]), spec.dtype)
    draft.bytes[source] = lambda: itertools.chain((data,), read())


def _changed(directory: ModelDirectory, files: Mapping[str, File]) -> list[str]:
    """Hold the files against conversion.json: other weights are noted, other settings would be lost and are refused."""
    weights = {*directory.weight_files(), *directory.record.sidecars}
    notes, problems = [], []
    for name, kept in files.items():
        path = directory.path / name
        same = path.is_file() and sha256_of(path) == kept.sha256
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


def _with_rows(whole: Callable[[], Iterator[bytes]], rows: Mapping[str, str]) -> Callable[[], Iterator[bytes]]:
    """Put back the rows that the conversion edited."""

    def read() -> Iterator[bytes]:
        data = bytearray(b"".join(whole()))
        for row, text in rows.items():
            old = bytes.fromhex(text)
            data[int(row) * len(old) : (int(row) + 1) * len(old)] = old
        yield bytes(data)

    return read
