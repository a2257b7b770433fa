"""What a conversion is asked for, read from the files that a caller names, or from the record of an earlier conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.checkpoint.data_config import read_data_config
from convert.checkpoint.dictionary import from_file
from convert.directory import ModelDirectory
from convert.families import Request


def make_request(
    *,
    head: str | None = None,
    dictionary: str | Path | None = None,
    training_only: Sequence[str] = (),
    keep_final_proj: bool = False,
    language: str | None = None,
    data_config: str | Path | None = None,
    post_process: str | None = None,
    ema: bool = False,
    arch: str = "",
    normalize: bool | None = None,
) -> Request:
    """Read the files that a request names; the arguments are those of `convert.plan`.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    data = read_data_config(Path(data_config)) if data_config else None
    symbols = from_file(Path(dictionary)) if dictionary else data.dictionary if data else None
    return Request(
        head=head or "",
        dictionary=symbols,
        training_only=tuple(training_only),
        keep_final_proj=keep_final_proj,
        language=language or "",
        data_config=data,
        post_process=post_process or "",
        ema=ema,
        arch=arch,
        normalize=normalize,
    )


def request_again(
    directory: ModelDirectory,
    opened: Checkpoint,
    *,
    dictionary: str | Path | None = None,
) -> Request:
    """Ask for the same as a conversion did.

    Args:
        directory: what it made: its record names no files, and keeps the dictionary of checkpoints that carry none.
        opened: the checkpoint.
        dictionary: as for `convert.plan`.
    """
    record = directory.record
    made = make_request(
        dictionary=dictionary,
        training_only=tuple(record.training_only),
        **record.asked.opening,
        head=record.asked.head,
        keep_final_proj=record.asked.keep_final_proj,
        language=record.asked.language,
        post_process=record.asked.post_process,
    )
    if made.dictionary is None and opened.dictionary is None:
        made = replace(made, dictionary=record.dictionary)
    return replace(made, data_config=directory.data_config)
