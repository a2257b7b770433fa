"""What the model directory's JSON files must say: a fresh plan of the checkpoint, compared value by value with what lies there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.errors import Problem
from convert.families import Conversion, describe
from convert.model.directory import ModelDirectory
from convert.package import request_again

AFTERWARDS = ("verification.json", "evaluation.json", "README.md")  # written later, and read by no model


def fresh_plan(opened: Checkpoint, directory: ModelDirectory, **options: Any) -> Conversion:
    """Plan the conversion again, with what the directory's conversion.json says was asked for.

    Args:
        opened: the checkpoint.
        directory: the model directory.
        options: `dictionary` and `base`, as for `convert.plan`.

    Raises:
        PlanError: the checkpoint cannot be converted.
        ConvertError: `not-a-model`.
    """
    return describe(opened, request_again(directory, opened, **options))


def expected_files(model: Conversion, dtype: str) -> dict[str, Any]:
    """Return the content that a conversion gives each JSON file beside the weights.

    Args:
        model: the fresh plan.
        dtype: what the conversion was asked for: `keep`, `float32`, `float16` or `bfloat16`.
    """
    config = model.configuration
    if dtype in ("float32", "float16", "bfloat16"):
        config["torch_dtype"] = dtype
    return {"config.json": config, **model.processor.files}


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
            continue
        if isinstance(meant, bytes):
            same = path.read_bytes() == meant
            problems += [] if same else [Problem("file", name, "is not the file that the conversion wrote")]
        else:
            problems += differences(name, meant, json.loads(path.read_text("utf-8")))
    known = {*expected, *AFTERWARDS, "conversion.json", "model.safetensors.index.json", *directory.weight_files()}
    known |= set(directory.sidecars)
    for path in sorted(directory.path.iterdir()):
        if path.name not in known and path.suffix in (".json", ".safetensors", ".bin"):
            problems.append(
                Problem("unexpected-file", path.name, "no conversion writes it, and transformers may read it")
            )
    return problems


def differences(name: str, meant: Any, found: Any) -> Iterator[Problem]:
    """Name the values of a JSON file that are not what they should be.

    Example:
        >>> [str(problem) for problem in differences("config.json", {"a": 1}, {"a": 2})]
        ['config.json: a is 2, expected 1']
    """
    if not isinstance(meant, dict) or not isinstance(found, dict):
        if meant != found:
            yield Problem("file", name, f"is {_short(found)}, expected {_short(meant)}")
        return
    for key in sorted({*meant, *found}):
        if key not in found:
            yield Problem("file", name, f"{key} is missing, expected {_short(meant[key])}")
        elif key not in meant:
            yield Problem("file", name, f"{key} is {_short(found[key])}, expected nothing")
        elif type(meant[key]) is not type(found[key]) or meant[key] != found[key]:
            yield Problem("file", name, f"{key} is {_short(found[key])}, expected {_short(meant[key])}")


def compare_records(directory: ModelDirectory, model: Conversion) -> list[Problem]:
    """Compare conversion.json with the files it speaks of, and with the fresh plan.

    Args:
        directory: the model directory.
        model: the fresh plan.
    """
    record = directory.conversion
    fills = [fill.record for fill in model.plan.fills]
    drops = [drop.record for drop in model.plan.drops]
    named = ("key", "row", "rule", "value")
    edits = [{name: e.record[name] for name in named} for e in model.plan.table.edits]
    found_edits = [{name: edit.get(name) for name in named} for edit in record.get("edits") or ()]
    meant = {"fills": fills, "drops": drops, "edits": edits, "sidecars": sorted(one.file for one in model.sidecars)}
    stated = {"fills": record.get("fills"), "drops": record.get("drops"), "edits": found_edits}
    stated["sidecars"] = sorted(directory.sidecars)
    problems = [*differences("conversion.json", meant, stated)]
    found = hashes(directory.path)
    for name, facts in sorted((record.get("files") or {}).items()):
        if found.get(name) != facts["sha256"]:
            detail = "is not the file that the conversion wrote, by its SHA-256" if name in found else "is missing"
            problems.append(Problem("changed-file", name, detail))
    return problems


def hashes(folder: Path) -> dict[str, str]:
    """Hash every file of a model directory but those that are written after a verification."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in AFTERWARDS and not path.name.startswith("."):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            found[path.name] = digest.hexdigest()
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
