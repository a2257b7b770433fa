"""fairseq's `config.yaml` of a speech-to-text task, with the dictionary and the sentencepiece model that it names.

The checkpoint carries none of the three: `fairseq.data.audio.data_cfg.S2TDataConfig` reads them beside the training data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.checkpoint.dictionary import Dictionary, from_file
from convert.checkpoint.settings import TooLargeError, plain_data
from convert.errors import CheckpointError

_LARGEST = {"YAML file": 200_000, "sentencepiece model": 20_000_000}  # bytes; usual ones have 1 kB, and 1 MB


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
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads plain data, and no merge keys, whose content can grow without bounds: `<<: [*a, *a]`."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("merge keys (<<) are not read")

    try:
        values = plain_data(yaml.load(_content(path, "YAML file").decode("utf-8"), Loader))
    except (TooLargeError, RecursionError):
        raise _bad(path, "is deeper or larger than any task's") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # of tags: !!int x, !!bool x
        raise _bad(path, f"is no YAML file ({(str(error).splitlines() or [''])[0]})") from None
    if not isinstance(values, dict):
        raise _bad(path, "holds no settings of a task")
    tokenizer = values.get("bpe_tokenizer")
    named = tokenizer.get("sentencepiece_model") if isinstance(tokenizer, dict) else None
    dictionary = from_file(_beside(path, values.get("vocab_filename", "dict.txt"), "vocab_filename"))
    return DataConfig(values, dictionary, _subwords(_beside(path, named, "sentencepiece_model")) if named else b"")


def _beside(path: Path, named: Any, setting: str) -> Path:
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
    raise _bad(path, f"names {parts[-1][:60]!r} as {setting}, which does not lie beside it", hint)


def _subwords(path: Path) -> bytes:
    data = _content(path, "sentencepiece model")
    if not any(pieces(data)):
        raise CheckpointError(
            f"{path.name} is no sentencepiece model", code="bad-data-config", key=path.name, hint="it ends with .model"
        )
    return data


def _content(path: Path, kind: str) -> bytes:
    """Read a file that is not larger than any of its kind."""
    try:
        if not path.is_file():  # reading from a pipe or a device may never end
            raise _bad(path, "is no file" if path.exists() else "is not there")
        with path.open("rb") as file:
            data = file.read(_LARGEST[kind] + 1)
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror or error}") from None
    if len(data) > _LARGEST[kind]:
        raise _bad(path, f"is larger than any {kind}, which have {_LARGEST[kind]} bytes at most")
    return data


def pieces(model: bytes) -> Iterator[str]:
    """List the pieces of a sentencepiece model, in the order of their ids; of another file, none or a few.

    The file is a protocol buffer, `ModelProto` of sentencepiece_model.proto: field 1, repeated, is a piece, and the piece's
    field 1 is its text.
    """
    for number, value in _fields(model):
        if number == 1:
            texts = [content for field, content in _fields(value) if field == 1]
            yield texts[0].decode("utf-8", "replace") if texts else ""


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Walk the fields of a protocol buffer's message; stop where it is none."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        lengths = {1: 8, 5: 4}
        if tag & 7 == 0:
            _, end = _number(data, at)
        else:
            length, at = _number(data, at) if tag & 7 == 2 else (lengths.get(tag & 7, -1), at)
            end = at + length
        if tag < 0 or not at <= end <= len(data):
            return
        yield tag >> 3, data[at:end]
        at = end


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Read a varint: the number, and where the next byte is; a number below zero where there is none."""
    value = 0
    for shift, byte in enumerate(data[at : at + 9]):
        value |= (byte & 127) << (7 * shift)
        if byte < 128:
            return value, at + shift + 1
    return -1, at - 1


def _bad(path: Path, what: str, hint: str = "") -> CheckpointError:
    hint = hint or "name the config.yaml that fairseq-train read from its data folder"
    return CheckpointError(f"{path.name} {what}", code="bad-data-config", key=path.name, hint=hint)
