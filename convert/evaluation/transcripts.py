"""Finished transcripts in a JSON Lines file, so that an interrupted evaluation continues where it stopped.

`datasets` does not do this: `map` deletes its cache file when it is interrupted, and a streamed dataset has none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from convert.errors import ConvertError
from convert.evaluation.data import Utterance
from convert.files import open_log
from convert.reading import LISTS, read_file

Transcribe = Callable[[Sequence[Utterance]], Sequence[str]]


def key_of(*parts: str) -> str:
    """Return the SHA-256 of the parts and of their boundaries.

    Example:
        >>> key_of("ab", "c") == key_of("a", "bc")
        False
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def default_path(run: str) -> Path:
    """Return the file of a run in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fairseq-to-hf" / f"evaluate-{run[:32]}.jsonl"


class Transcripts:
    """Transcripts by key, one JSON line each. Several processes may append to one file.

    Args:
        path: the file; it and its folder are made when missing. A line that was cut off is skipped.

    Raises:
        ConvertError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_log(path)
            lines = read_file(path, LISTS).split(b"\n")
        except OSError as error:
            raise ConvertError(
                f"{path.name}: finished transcripts cannot be kept: {error.strerror}",
                code="transcripts",
                key=path.name,
                hint="name a file that can be written: --transcripts FILE.jsonl",
            ) from error
        if lines[-1]:
            self._file.write(b"\n")
        self._known: dict[str, str] = {}
        for line in lines:
            try:
                record = json.loads(line)
                key, hypothesis = record["key"], record["hypothesis"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(key, str) and isinstance(hypothesis, str):
                self._known[key] = hypothesis

    def of(self, transcribe: Transcribe, *, framework: str, model: str) -> Transcribe:
        """Return a function that transcribes only what the file lacks, and adds it.

        Args:
            transcribe: one text for each utterance.
            framework: `transformers` or `fairseq`.
            model: a digest of everything beside the samples that decides a text.
        """

        def remembered(utterances: Sequence[Utterance]) -> list[str]:
            keys = [key_of(framework, model, utterance.digest) for utterance in utterances]
            new = {key: one for key, one in zip(keys, utterances, strict=True) if key not in self._known}
            if new:
                self._add(framework, new, transcribe(list(new.values())))
            return [self._known[key] for key in keys]

        return remembered

    def _add(self, framework: str, new: dict[str, Utterance], texts: Sequence[str]) -> None:
        lines = []
        for (key, utterance), text in zip(new.items(), texts, strict=True):
            record = {"key": key, "framework": framework, "name": utterance.name}
            record |= {"reference": utterance.text, "hypothesis": text}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            self._known[key] = text
        self._file.write("".join(lines).encode(errors="backslashreplace"))

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and delete it when asked."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)
