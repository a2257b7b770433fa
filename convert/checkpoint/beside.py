"""Read the small files beside a checkpoint: whole, as plain data, and up to a bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.checkpoint.settings import TooLargeError, plain_data
from convert.errors import ConvertError
from convert.reading import read_file

# in bytes; usual ones have 1 kB, 1 MB and 10 kB, one of a million words 20 MB
_LARGEST = {"YAML file": 200_000, "sentencepiece model": 20_000_000, "dictionary": 100_000_000}
Complaint = Callable[[str], Exception]  # makes an error of what is wrong with the file


def read_beside(path: Path, kind: str, bad: Complaint) -> bytes:
    """Read a file.

    Args:
        path: the file.
        kind: `YAML file`, `sentencepiece model` or `dictionary`.
        bad: makes the error where it cannot be read.
    """
    try:
        return read_file(path, _LARGEST[kind])
    except FileNotFoundError:
        raise bad("is not there") from None
    except OSError as error:
        raise bad(f"cannot be read: {error.strerror or error}") from None
    except ConvertError as error:
        what = "is not a file" if error.code == "not-a-file" else f"is larger than any {kind}"
        raise bad(what) from None


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
        text = read_beside(path, "YAML file", bad).decode("utf-8")
        return [plain_data(document) for document in yaml.load_all(text, Loader)]
    except (TooLargeError, RecursionError):
        raise bad("is deeper or larger than any that a training writes") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # of tags: !!int x, !!bool x
        raise bad(f"is not a YAML file ({(str(error).splitlines() or [''])[0]})") from None
