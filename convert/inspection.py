"""What a file is, what it holds, and whether it can be converted; if not, why, and which option helps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, is_harmless
from convert.checkpoint.container import DTYPES
from convert.checkpoint.opening import Survey, survey
from convert.checkpoint.refusals import writer
from convert.checkpoint.stored import StoredTensor
from convert.errors import CheckpointError, ConvertError
from convert.families import ANCHORS, Request, architecture_of, describe
from convert.request import Options
from convert.sources import locate


def inspect(source: str | Path, **asked: Any) -> dict[str, Any]:
    """Look into a file without reading its tensors, and plan its conversion.

    Args:
        source: as for `convert.plan`.
        asked: the options of `convert.plan`, where the conversion needs some.

    Returns:
        What it is and holds, as plain data. `conversion` says whether it can be converted so, to which class, or else every
        reason and the remedy.

    Raises:
        CheckpointError: it is not a file of tensors, with the error that says what it is.
    """
    try:
        with Options(**asked).opened(source) as (opened, request):
            return _opened(opened) | {"conversion": _conversion(opened, request)}
    except CheckpointError as error:
        return _unusable(source, error)


def _opened(opened: Checkpoint) -> dict[str, Any]:
    inventory, settings = opened.inventory, opened.settings
    model, task = settings["model"], settings["task"]
    return {
        "file": {"name": opened.path.name, "size": opened.size, "container": opened.container.kind}
        | {"compressed": opened.container.unpack is not None},
        "writer": writer(opened.container.value) if isinstance(opened.container.value, dict) else "",
        "where": opened.where,
        "prefix": opened.prefix,
        "outside": list(opened.outside),
        "averages": list(opened.averages),
        "layout": opened.layout,
        "architecture": architecture_of(opened),
        "task": task.get("_name"),
        "parameters": sum(math.prod(spec.shape) for spec in inventory.values()),
        "dtypes": sorted({spec.dtype for spec in inventory.values()}),
        "dictionary": list(opened.dictionary.symbols) if opened.dictionary else None,
        "pretraining_dictionaries": [list(dictionary.symbols) for dictionary in opened.dictionaries],
        "languages": sorted(opened.groups) or _stacked(model, task),
        "training_state": opened.parts,
        "globals": _globals(opened.globals),
        "settings": settings,
        "tensors": {name: {"shape": spec.shape, "dtype": spec.dtype} for name, spec in inventory.items()},
    }


def _conversion(opened: Checkpoint, request: Request) -> dict[str, Any]:
    try:
        model = describe(opened, request)
    except ConvertError as error:
        return _refused(error)
    return {"ok": True, "class": model.target, "head": model.head, "notes": list(model.notes)}


def _refused(error: ConvertError) -> dict[str, Any]:
    rows = [problem.row for problem in error.problems]
    return {"ok": False, "message": error.message, "problems": rows, "hint": error.hint}


def _unusable(source: str | Path, error: CheckpointError) -> dict[str, Any]:
    """Describe a file of tensors that cannot be opened as a checkpoint; anything else is reported by its error."""
    if error.code not in ("no-settings", "ambiguous", "foreign-file", "shard"):
        raise error
    try:
        seen = survey(locate(source)[0], ANCHORS)
    except CheckpointError:
        raise error from None
    try:
        if not (seen.states or seen.averages):
            raise error
        return _seen(seen) | {"conversion": _refused(error)}
    finally:
        seen.container.close()


def _seen(seen: Survey) -> dict[str, Any]:
    """Describe the state_dict with a model in it, or else the largest."""
    state = max((*seen.states, *seen.averages), key=lambda one: (len(one.roots), len(one.entries)))
    container, prefix, settings = seen.container, next(iter(state.roots), ""), seen.settings_of(state)
    found = {str(name): value for name, value in state.entries.items() if isinstance(value, StoredTensor)}
    dtypes = {DTYPES.get(tensor.storage.type, tensor.storage.type) for tensor in found.values()}
    return {
        "file": {"name": seen.path.name, "size": container.size, "container": container.kind}
        | {"compressed": container.unpack is not None},
        "writer": writer(seen.top),
        "where": state.where,
        "prefix": prefix,
        "outside": [name for name in found if not name.startswith(prefix)],
        "averages": [average.where for average in seen.averages],
        "layout": settings.layout,
        "architecture": None,
        "task": None,
        "parameters": sum(math.prod(tensor.shape) for tensor in found.values()),
        "dtypes": sorted(dtypes),
        "dictionary": None,
        "pretraining_dictionaries": [],
        "languages": [],
        "training_state": {},
        "globals": _globals(sorted(map(str, container.globals))),
        "settings": settings.values,
        "tensors": {name: {"shape": tensor.shape, "dtype": tensor.storage.type} for name, tensor in found.items()},
    }


def _globals(names: Iterable[str]) -> list[dict[str, Any]]:
    return [{"name": name, "known_harmless": is_harmless(name)} for name in names]


def _stacked(model: Mapping[str, Any], task: Mapping[str, Any]) -> list[str]:
    """The languages whose adapters stand in one tensor, by their order there."""
    keys, count = task.get("multi_corpus_keys"), model.get("adp_num")
    names = [key.strip() for key in keys.split(",")] if isinstance(keys, str) else []
    return names if isinstance(count, int) and len(names) == count > 1 else []
