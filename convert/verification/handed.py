"""What fairseq's side is handed of a checkpoint: settings as plain values, and where the numbers of each tensor are.

fairseq evaluates texts, imports and opens what they name, and resolves `${...}`. So a text is handed over only where a plan
has given it a meaning, as a word or as numbers; convolutions are written anew from what was read.
"""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.container import Container
from convert.checkpoint.stacks import stack
from convert.checkpoint.stored import StoredTensor
from convert.families.settings import parse_convolutions

_PLAIN = re.compile(r"\w*|[\d.,:e+ -]*", re.ASCII)


def handed(
    opened: Checkpoint,
    architecture: str,
    settings: Mapping[str, Any],
    training_only: Iterable[str],
    dropped: Iterable[str] = (),
) -> dict[str, Any]:
    """Make the part of a request that is the checkpoint's.

    Args:
        opened: the checkpoint.
        dropped: the tensors that a conversion leaves out, those too that a checkpoint may lack.
        architecture, settings, training_only: as for `plain_settings`.
    """
    files = [one.place for one in opened.container.files]
    return {
        "settings": plain_settings(settings, architecture, training_only),
        "files": [{"path": str(file.path), "stamp": file.stamp} for file in files],
        "tensors": places(opened.container, opened.tensors),
        "absent": sorted({*dropped} - opened.tensors.keys()),
        "groups": Groups(opened),
        "tokenizer": base64.b64encode(opened.tokenizer).decode(),
    }


def plain_settings(settings: Mapping[str, Any], architecture: str, training_only: Iterable[str]) -> dict[str, Any]:
    """Keep of a checkpoint's settings what fairseq builds a model from.

    Args:
        settings: the sections `model` and `task`, with `w2v_args` filled in.
        architecture: fairseq's name of it.
        training_only: the settings that a plan found to act while training only, of which no text is kept.

    Example:
        >>> plain_settings({"model": {"dropout": 0.1, "w2v_path": "base.pt"}, "task": {}}, "wav2vec2", {})
        {'model': {'dropout': 0.1, '_name': 'wav2vec2'}, 'task': {'normalize': False}}
    """
    model, without = settings["model"], frozenset(training_only)
    made = _plain(model, without) | {"_name": architecture}
    if isinstance(model.get("w2v_args"), dict):
        made["w2v_args"] = {"model": _plain(model["w2v_args"]["model"], without)}
    return {"model": made, "task": {"normalize": bool(settings["task"].get("normalize", False))}}


def _plain(section: Mapping[str, Any], training_only: frozenset[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict) and name != "w2v_args":
            made[name] = _plain(value, training_only)
        elif _is_numbers(value) or (name not in training_only and _is_plain(value)):
            made[name] = value
    with contextlib.suppress(ValueError):  # of a Namespace around the encoder's, where nothing reads it
        made["conv_feature_layers"] = str(parse_convolutions(str(section.get("conv_feature_layers"))))
    return made


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and _PLAIN.fullmatch(value) is not None


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_numbers, value))
    return value is None or isinstance(value, (int, float))


def places(container: Container, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Say where the numbers of tensors are; adapters that were told apart are stacked again, as fairseq has them."""
    made = {}
    for name, rows in stack(tensors).items():
        parts = [part for row in rows or [name] for part in tensors[row].parts]
        kind, width = container.dtype(parts[0])
        made[name] = (kind, [_place(container, part, width, stacked=bool(rows)) for part in parts])
    return made


def _place(container: Container, part: StoredTensor, width: int, stacked: bool) -> tuple[Any, ...]:
    where = container.storages[part.storage.key]
    shape, stride = ((1, *part.shape), (0, *part.stride)) if stacked else (part.shape, part.stride)
    return where.file, where.start + part.offset * width, shape, stride


@dataclass(frozen=True, slots=True)
class Groups(Mapping[str, Any]):
    """The tensors and symbols of languages that a checkpoint keeps apart, each found when it is asked for."""

    checkpoint: Checkpoint

    def __getitem__(self, name: str) -> dict[str, Any]:
        group = self.checkpoint.groups[name]
        symbols = list(group.dictionary.symbols) if group.dictionary else []
        return {"tensors": places(self.checkpoint.container, group.tensors), "symbols": symbols}

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.groups)

    def __len__(self) -> int:
        return len(self.checkpoint.groups)
