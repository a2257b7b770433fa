"""What the model directory's JSON files must say: a fresh plan of the checkpoint, compared with them value by value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.conversion import NAME as RECORD
from convert.conversion import differences, json_text, record_of
from convert.directory import ModelDirectory
from convert.errors import Problem
from convert.families import describe
from convert.files import Hashes
from convert.reading import read_file
from convert.report import VERSION, json_bytes
from convert.request import request_again

INDEX = "model.safetensors.index.json"
AFTERWARDS = ("verification.json", "evaluation.json", "README.md")  # written later, and read by no model


@dataclass(frozen=True, slots=True)
class Expected:
    """What a conversion of the checkpoint writes today.

    Args:
        files: the content by file name: bytes, or the value of a JSON file.
        record: the content of conversion.json, but for its `files`.
    """

    files: Mapping[str, Any]
    record: Mapping[str, Any]


def expect(opened: Checkpoint, directory: ModelDirectory, sha256: str, dictionary: Path | None = None) -> Expected:
    """Plan the conversion again, with what the directory's conversion.json says was asked for.

    Args:
        opened: the checkpoint.
        directory: the model directory.
        sha256: the checkpoint's.
        dictionary: as for `convert.plan`.

    Raises:
        PlanError: the checkpoint cannot be converted.
        ConvertError: `not-a-model`.
    """
    request = request_again(directory, opened, dictionary=dictionary)
    model, dtype = describe(opened, request), directory.record.dtype
    config = model.configuration
    if dtype != "keep":
        config["torch_dtype"] = dtype
    files = {"config.json": config, **model.processor.files}
    if (directory.path / INDEX).is_file():
        names = {name: place.file for name, place in directory.tensors.items()}
        size = sum(place.count for place in directory.tensors.values())
        files[INDEX] = {"metadata": {"total_size": size}, "weight_map": names}
    made = record_of(opened, model, request, sha256, dtype, {}, VERSION)
    return Expected(files, json.loads(json_bytes(made)))


def compare_files(directory: ModelDirectory, expected: Mapping[str, Any]) -> list[Problem]:
    """Compare every JSON file of a model directory with what a fresh plan would write.

    This finds what no output shows, such as a value that acts while training only.

    Args:
        directory: the model directory.
        expected: the content by file name.

    Returns:
        One problem for each value that differs, is missing, or is one too many.
    """
    problems = []
    for name, meant in sorted(expected.items()):
        path = directory.path / name
        if not path.is_file():
            problems.append(Problem("missing-file", name, "is not in the model directory"))
        elif isinstance(meant, bytes):
            same = path.stat().st_size == len(meant) and read_file(path) == meant
            problems += [] if same else [Problem("file", name, "is not the file that the conversion wrote")]
        else:
            problems += differences(name, meant, directory.json(name))
    known = {*expected, *AFTERWARDS, RECORD, *directory.weight_files(), *directory.record.sidecars}
    for path in sorted(directory.path.iterdir()):
        if path.name not in known and path.suffix in (".json", ".safetensors", ".bin"):
            problems.append(
                Problem("unexpected-file", path.name, "no conversion writes it, and transformers may read it")
            )
    return problems


def compare_records(
    directory: ModelDirectory, expected: Expected, found_files: Mapping[str, str] | None = None
) -> tuple[list[Problem], dict[str, str]]:
    """Compare conversion.json as a whole with what a conversion writes today, and with the files that it names.

    Args:
        directory: the model directory.
        expected: what is written today.
        found_files: the SHA-256 of its files, where they are known.

    Returns:
        What is wrong, and what differs for a reason that is not a fault: a checkpoint under another name, a place that it was not fetched from then, the words of
        another version of this tool, and what earlier versions did not write and is empty. Nothing else may differ.
    """
    found, meant, differing = dict(directory.record.values), dict(expected.record), {}
    meant["files"] = {name: {"sha256": file.sha256, "size": file.size} for name, file in directory.record.files.items()}
    problems = _compare_files_named(directory, expected, hashes(directory.path) if found_files is None else found_files)
    made_by = directory.record.tool.version
    if made_by != meant["tool"]["version"]:
        version = f"version {made_by or 'unknown'}"
        differing["conversion.json: tool.version"] = f"made by {version}"
        found["tool"] = _but(found.get("tool"), version=meant["tool"]["version"])
        for key, without in _WORDS.items():
            ours, theirs = without(meant.get(key)), without(found.get(key))
            if json_text(meant.get(key)) != json_text(found.get(key)) and json_text(ours) == json_text(theirs):
                differing[f"conversion.json: {key}"] = f"worded by {version}"
                found[key] = meant[key]
    for key in [key for key in meant.keys() - found.keys() if not meant[key]]:
        differing[f"conversion.json: {key}"] = "missing; it would be empty"
        del meant[key]
    if meant.get("base") and isinstance(found.get("base"), dict) and found["base"].get("name") != meant["base"]["name"]:
        differing[f"{RECORD}: base.name"] = f"{found['base'].get('name')}, which is called {meant['base']['name']} now"
        found["base"] = _but(found["base"], name=meant["base"]["name"])
    if found.get("source") != meant["source"]:
        named = (found.get("source") or {}).get("name")
        if named != meant["source"]["name"]:
            differing[f"{RECORD}: source.name"] = f"{named}, which is called {meant['source']['name']} now"
        found["source"] = _but(found.get("source"), name=meant["source"]["name"])
        meant["source"] = dict(meant["source"])
        for key in ("address", "catalogue"):
            stated, known = (found["source"] or {}).get(key), meant["source"].get(key)
            if known is not None and stated is None:
                differing[f"{RECORD}: source.{key}"] = "converted from a local file, which has none"
                del meant["source"][key]
            elif stated is not None and known is None:
                detail = f"source.{key} is {stated!r}, and this file was not fetched there: name that as the checkpoint"
                problems.append(Problem("file", RECORD, detail))
                found["source"] = {other: value for other, value in found["source"].items() if other != key}
    for key in sorted({*meant, *found}):  # key by key, so that what is equal is compared at once
        ours, theirs = ({key: side[key]} if key in side else {} for side in (meant, found))
        if json_text(ours) != json_text(theirs):
            problems += differences(RECORD, ours, theirs)
    return problems, differing


def _compare_files_named(directory: ModelDirectory, expected: Expected, found: Mapping[str, str]) -> list[Problem]:
    problems = []
    named = directory.record.files
    for name in sorted({*expected.files, *directory.weight_files(), *directory.record.sidecars, *named}):
        if name not in named:
            problems.append(Problem("file", RECORD, f"files.{name} is missing"))
        elif found.get(name) != named[name].sha256:
            detail = "is not the file that the conversion wrote, by its SHA-256" if name in found else "is missing"
            problems.append(Problem("changed-file", name, detail))
        elif (directory.path / name).stat().st_size != named[name].size:
            problems.append(Problem("file", RECORD, f"files.{name}.size is {named[name].size}"))
    return problems


def _but(values: Any, **others: Any) -> Any:
    return {**values, **others} if isinstance(values, dict) else values


def _without_reasons(rows: Any) -> Any:
    return [{key: value for key, value in row.items() if key != "reason"} for row in rows or ()]


# what is worded anew from version to version -> what of it is not words
_WORDS: dict[str, Callable[[Any], Any]] = {
    "config": lambda origins: sorted(origins or ()),
    "drops": _without_reasons,
    "edits": _without_reasons,
    "fills": _without_reasons,
    "table": lambda table: None,
}


def hashes(folder: Path, known: Hashes | None = None) -> dict[str, str]:
    """Hash every file of a model directory but those that are written after a verification.

    Args:
        folder: the model directory.
        known: remembers what was hashed, so that it can be checked later to be still the same.
    """
    known = Hashes() if known is None else known
    paths = [path for path in sorted(folder.iterdir()) if path.name not in AFTERWARDS and not path.name.startswith(".")]
    return {path.name: known.of(path) for path in paths if path.is_file()}
