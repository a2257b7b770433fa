"""Read the small files that lie beside a checkpoint: whole, as plain data, and none that is larger than any of its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.checkpoint.settings import TooLargeError, plain_data

_LARGEST = {"YAML file": 200_000, "sentencepiece model": 20_000_000}  # bytes; usual ones have 1 kB, and 1 MB
Complaint = Callable[[str], Exception]  # makes an error of what is wrong with the file


def read_bytes(path: Path, kind: str, bad: Complaint) -> bytes:
    """Read a file.

    Args:
        path: the file.
        kind: `YAML file` or `sentencepiece model`.
        bad: makes the error where it cannot be read.
    """
    try:
        if not path.is_file():  # reading from a pipe or a device may never end
            raise bad("is not a file" if path.exists() else "is not there")
        with path.open("rb") as file:
            data = file.read(_LARGEST[kind] + 1)
    except OSError as error:
        raise bad(f"cannot be read: {error.strerror or error}") from None
    if len(data) > _LARGEST[kind]:
        raise bad(f"is larger than any {kind}, which have {_LARGEST[kind]} bytes at most")
    return data


def read_yaml(path: Path, bad: Complaint) -> list[Any]:
    """Read the documents of a YAML file.

    Args:
        path: the file.
        bad: makes the error where it cannot be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads plain data, and no merge keys, whose content can grow without bounds: `<<: [*a, *a]`."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("merge keys (<<) are not read")

    try:
        text = read_bytes(path, "YAML file", bad).decode("utf-8")
        return [plain_data(document) for document in yaml.load_all(text, Loader)]
    except (TooLargeError, RecursionError):
        raise bad("is deeper or larger than any that a training writes") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # of tags: !!int x, !!bool x
        raise bad(f"is not a YAML file ({(str(error).splitlines() or [''])[0]})") from None
