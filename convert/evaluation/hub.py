"""Streams speech and transcripts from a dataset of the Hub, or from a local folder that `datasets` can load."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.evaluation.data import Dataset, Item, Source, read_audio
from convert.evaluation.packages import require, silence

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")


def hub_source(
    name: str, config: str | None, split: str, revision: str | None, text_column: str | None, rate: int
) -> Source:
    """Open a split of a dataset, streaming: nothing is kept on disk.

    Recordings are decoded with soundfile from their own bytes, because `datasets` resamples when it decodes.

    Args:
        name: the Hub's name of the dataset, or a local folder.
        config: its configuration.
        split: its split.
        revision: a branch, tag or commit; it is resolved to the commit where the Hub can be asked.
        text_column: the column of the transcripts; by default the only one of `TEXT_COLUMNS` that is there.
        rate: the model's sampling rate in Hz.

    Raises:
        ConvertError: the dataset cannot be opened, or has no single column of audio or of transcripts.
    """
    datasets = require("datasets")
    local = Path(name).is_dir()
    if not local:
        revision = _commit(name, revision)
    try:
        with silence():
            stream = datasets.load_dataset(name, name=config, split=split, revision=revision, streaming=True)
        columns = stream.features or dict.fromkeys(next(iter(stream.take(1)), {}))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        shown = Path(name).name if local else name
        raise ConvertError(f"{shown}: cannot be opened: {reason}", code="dataset", key=shown) from error
    audio = [column for column, feature in columns.items() if isinstance(feature, datasets.Audio)]
    text = [text_column] if text_column else [column for column in TEXT_COLUMNS if column in columns]
    shown = Path(name).resolve().name if local else name
    _single(shown, "audio", audio, list(columns), "")
    _single(shown, "transcripts", [c for c in text if c in columns], list(columns), "name it with --text-column")
    stream = stream.cast_column(audio[0], datasets.Audio(decode=False))
    counts = (stream.info.splits or {}).get(split)
    identity = Dataset("local" if local else name, shown.rpartition("/")[2], config, split, revision)
    return Source(identity, _items(stream, audio[0], text[0], rate), counts.num_examples if counts else None, local)


def _single(name: str, what: str, found: list[str], columns: list[str], hint: str) -> None:
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        message = f"{name}: expected one column of {what}, found {listed} among {', '.join(columns)}"
        raise ConvertError(message, code="columns", key=name, hint=hint)


def _items(stream: Any, audio: str, text: str, rate: int) -> Iterator[Item]:
    rows = enumerate(stream)
    while True:
        try:
            index, row = next(rows)
        except StopIteration:
            return
        except (
            ImportError
        ) as error:  # `datasets` needs torchcodec for folders of bare recordings, though none is decoded
            missing = error.name or "torchcodec"
            raise ConvertError(
                f"datasets needs {missing} for a dataset of this layout, and it is not installed",
                code="missing-package",
                key=missing,
                hint=f"pip install {missing}, or give a folder with .txt files or *.trans.txt to --folder",
            ) from error
        recording = row[audio]
        content, path = recording.get("bytes"), recording.get("path")
        name = str(row.get("id") or Path(path or f"{index:06d}").name)
        yield Item(name, str(row[text]).strip(), partial(_decode, name, content, path, rate))


def _decode(name: str, content: bytes | None, path: str | None, rate: int) -> Any:
    if content is not None:
        return read_audio(name, io.BytesIO(content), rate)
    if path is None:
        raise ConvertError(f"{name}: the dataset holds no audio for it", code="audio", key=name)
    if "://" in path:
        with require("fsspec").open(path, "rb") as file:
            return read_audio(name, io.BytesIO(file.read()), rate)
    return read_audio(name, Path(path), rate)


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision is now, or the revision itself when the Hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=30).sha or revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return revision  # `load_dataset` has its own cache, and says better what is wrong
