"""What a conversion is asked for: as the caller names it, as it is read, and again from the record of an earlier conversion."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from convert.checkpoint import Checkpoint
from convert.checkpoint.data_config import read_data_config
from convert.checkpoint.dictionary import from_file
from convert.families import Request
from convert.sources import dictionary_beside, locate, open_source

if TYPE_CHECKING:
    from convert.directory import ModelDirectory

Name = str | Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `convert.plan`, which explains them, beside the checkpoint. Nothing they name was read."""

    head: str | None = None
    dictionary: Name | None = None
    base: Name | None = None
    training_only: Sequence[str] = ()
    keep_final_proj: bool = False
    language: str | None = None
    data_config: Name | None = None
    post_process: str | None = None
    ema: bool = False
    arch: str = ""
    normalize: bool | None = None

    @contextlib.contextmanager
    def opened(self, checkpoint: Name) -> Iterator[tuple[Checkpoint, Request]]:
        """Open a checkpoint, wherever it is, and read the files that are named with it.

        Raises:
            ConvertError: one of them cannot be fetched or read.
        """
        dictionary = None if self.dictionary is None else locate(self.dictionary)[0]
        opening = {"ema": self.ema, "arch": self.arch, "normalize": self.normalize}
        with open_source(checkpoint, base=self.base, dictionary=dictionary, **opening) as opened:
            yield opened, replace(self, dictionary=dictionary or dictionary_beside(opened)).request()

    def request(self) -> Request:
        """Read the files that are named.

        Raises:
            CheckpointError: one of them cannot be read.
        """
        data = read_data_config(Path(self.data_config)) if self.data_config else None
        symbols = from_file(Path(self.dictionary)) if self.dictionary else data.dictionary if data else None
        return Request(
            head=self.head or "",
            dictionary=symbols,
            training_only=tuple(self.training_only),
            keep_final_proj=self.keep_final_proj,
            language=self.language or "",
            data_config=data,
            post_process=self.post_process or "",
            ema=self.ema,
            arch=self.arch,
            normalize=self.normalize,
        )


def request_again(directory: ModelDirectory, opened: Checkpoint, *, dictionary: Name | None = None) -> Request:
    """Ask for the same as a conversion did.

    Args:
        directory: what it made: its record names no files, and keeps the dictionary of checkpoints that carry none.
        opened: the checkpoint.
        dictionary: as for `convert.plan`.
    """
    record = directory.record
    asked = record.asked
    made = Options(
        head=asked.head,
        dictionary=dictionary,
        training_only=tuple(record.training_only),
        keep_final_proj=asked.keep_final_proj,
        language=asked.language,
        post_process=asked.post_process,
        **asked.opening,
    ).request()
    if made.dictionary is None and opened.dictionary is None:
        made = replace(made, dictionary=record.dictionary)
    return replace(made, data_config=directory.data_config)
