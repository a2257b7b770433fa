"""fairseq's `config.yaml` of a speech-to-text task, with the dictionary and the sentencepiece model that it names.

The checkpoint carries none of the three: `fairseq.data.audio.data_cfg.S2TDataConfig` reads them beside the training data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from convert.checkpoint.beside import read_beside, read_yaml
from convert.checkpoint.dictionary import Dictionary, from_file
from convert.checkpoint.sentencepiece import pieces
from convert.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What belongs to a speech-to-text checkpoint and lies beside it.

    Args:
        values: what `config.yaml` says.
        dictionary: the target dictionary.
        subwords: the sentencepiece model, as it is; empty where `config.yaml` names none.
    """

    values: Mapping[str, Any]
    dictionary: Dictionary
    subwords: bytes


def read_data_config(path: Path) -> DataConfig:
    """Read `config.yaml`, and beside it the files that it names.

    Args:
        path: the YAML file. What it names by a path of another machine is looked for beside it.

    Raises:
        CheckpointError: `bad-data-config`, `bad-dictionary`: a file is missing, or is something else.
    """
    documents = read_yaml(path, partial(_bad, path))
    values = documents[0] if len(documents) == 1 else None
    if not isinstance(values, dict):
        raise _bad(path, "holds no settings of a task")
    tokenizer = values.get("bpe_tokenizer")
    named = tokenizer.get("sentencepiece_model") if isinstance(tokenizer, dict) else None
    dictionary = from_file(_beside(path, values.get("vocab_filename", "dict.txt"), "vocab_filename"))
    return DataConfig(values, dictionary, _subwords(_beside(path, named, "sentencepiece_model")) if named else b"")


def _beside(path: Path, named: object, setting: str) -> Path:
    """Find a file that is named with the path that it had where the model was trained: beside this one, nowhere else."""
    if not isinstance(named, str) or not named:
        raise _bad(path, f"names no file as {setting}, but {str(named)[:60]!r}")
    parts = named.replace("\\", "/").split("/")
    inside = [named] if not {"", ".."} & {*parts} else []
    for name in (*inside, parts[-1]):
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if name not in ("", "..") and (path.parent / name).is_file():
                return path.parent / name
    hint = f"put it beside {path.name}, as fairseq's own scripts do"
    raise _bad(path, f"names {parts[-1][:60]!r} as {setting}, which is not next to it", hint)


def _subwords(path: Path) -> bytes:
    data = read_beside(path, "sentencepiece model", partial(_bad, path))
    if not any(pieces(data)):
        raise CheckpointError(
            f"{path.name} is not a sentencepiece model",
            code="bad-data-config",
            key=path.name,
            hint="it ends with .model",
        )
    return data


def _bad(path: Path, what: str, hint: str = "") -> CheckpointError:
    hint = hint or "name the config.yaml that fairseq-train read from its data folder"
    return CheckpointError(f"{path.name} {what}", code="bad-data-config", key=path.name, hint=hint)
