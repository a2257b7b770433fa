"""Remembers finished utterances in an append-only file, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from convert.errors import ConvertError


def key_of(*parts: str) -> str:
    """A name for everything that decides an answer: the digest of the parts and of where each one ends.

    Example:
        >>> key_of("ab", "c") == key_of("a", "bc")
        False
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def default_path(run: str) -> Path:
    """The journal of a run when none was named: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fairseq-to-hf" / f"evaluate-{run[:32]}.jsonl"


class Journal:
    """Transcripts by key, one JSON line each.

    A key covers the model, the settings and the samples; a record of another model or of a recording that has changed
    since is never found. A line that was cut off is skipped. Several processes may append to one file.

    Args:
        path: the file; it and its folder are made when missing.

    Raises:
        ConvertError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConvertError(
                f"{path.name}: finished utterances cannot be kept: {error.strerror}",
                code="journal",
                key=path.name,
                hint="name a file that can be written: --transcripts FILE.jsonl",
            ) from error
        self._known: dict[str, str] = {}
        for line in content.split(b"\n"):
            self._read(line)
        if content and not content.endswith(b"\n"):
            os.write(self._file, b"\n")  # a line was cut off: the next one starts afresh

    def _read(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            key, hypothesis = record["key"], record["hypothesis"]
        except (ValueError, KeyError, TypeError):
            return
        if isinstance(key, str) and isinstance(hypothesis, str):
            self._known[key] = hypothesis

    def find(self, key: str) -> str | None:
        """The transcript under a key, if it is known."""
        return self._known.get(key)

    def add(self, records: Iterable[Mapping[str, str]]) -> None:
        """Append records, each with `key` and `hypothesis` and what else people may want to read, in one write."""
        rows = list(records)
        lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        os.write(self._file, lines.encode())
        self._known.update((row["key"], row["hypothesis"]) for row in rows)

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and delete it when it has done its service."""
        os.close(self._file)
        if remove:
            self.path.unlink(missing_ok=True)
