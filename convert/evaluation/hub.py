"""Recordings with transcripts from a dataset of the Hub, or from a local folder that `datasets` can load."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from convert.audio import Waveform, bad_audio, read_audio
from convert.errors import ConvertError
from convert.evaluation.data import Dataset, Item, Source
from convert.evaluation.options import Options
from convert.loading import quiet
from convert.reading import LISTS, check_folder

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")


def hub_source(options: Options, rate: int) -> Source:
    """Open a split of a dataset, streaming: nothing is kept on disk.

    Recordings are decoded by soundfile from their own bytes, because `datasets` resamples when it decodes.

    Args:
        options: of which `dataset` names the dataset or a local folder. A revision is resolved to its commit where the
            Hub can be asked.
        rate: the model's sampling rate in Hz.

    Raises:
        ConvertError: the dataset cannot be opened, or does not have exactly one column of audio and one of transcripts.
    """
    import datasets

    name, split, revision = str(options.dataset), options.split or "test", options.revision
    local = Path(name).is_dir()
    shown = Path(name).resolve().name if local else name
    if local:
        check_folder(Path(name))
    else:
        revision = _commit(name, revision)
    try:
        with quiet():
            stream = datasets.load_dataset(name, name=options.config, split=split, revision=revision, streaming=True)
        columns = stream.features or dict.fromkeys(next(iter(stream.take(1)), {}))
    except (ConvertError, ImportError, MemoryError):
        raise
    except Exception as error:  # whatever a file or an answer of the Hub makes `datasets` raise
        raise _unreadable(shown, "opened", error) from error
    audio = [column for column, feature in columns.items() if isinstance(feature, datasets.Audio)]
    wanted = (options.text_column,) if options.text_column else TEXT_COLUMNS
    text = [column for column in wanted if column in columns]
    _single(shown, "audio", audio, list(columns), "choose a dataset whose recordings are in one column")
    _single(shown, "transcripts", text, list(columns), "name it with --text-column")
    stream = stream.cast_column(audio[0], datasets.Audio(decode=False))
    counts = (stream.info.splits or {}).get(split)
    identity = Dataset("local" if local else name, shown.rpartition("/")[2], options.config, split, revision)
    return Source(
        identity, _items(shown, stream, audio[0], text[0], rate), counts.num_examples if counts else None, local
    )


def _unreadable(name: str, what: str, error: Exception) -> ConvertError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    hint = "check its name, --config, --split and --revision; a gated dataset needs `hf auth login`"
    return ConvertError(f"{name}: cannot be {what}: {reason}", code="dataset", key=name, hint=hint)


def _single(name: str, what: str, found: list[str], columns: list[str], hint: str) -> None:
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        message = f"{name}: expected one column of {what}, found {listed} among {', '.join(columns)}"
        raise ConvertError(message, code="columns", key=name, hint=hint)


def _items(shown: str, stream: Any, audio: str, text: str, rate: int) -> Iterator[Item]:
    rows = enumerate(stream)
    while True:
        try:
            index, row = next(rows)
        except StopIteration:
            return
        except ImportError as error:  # `datasets` lists a folder of bare recordings with torchcodec only
            missing = error.name or "torchcodec"
            raise ConvertError(
                f"datasets needs {missing} for a dataset of this layout, and it is not installed",
                code="missing-package",
                key=missing,
                hint=f"pip install {missing}, or give a folder with .txt files or *.trans.txt to --folder",
            ) from error
        except Exception as error:
            raise _unreadable(shown, "read", error) from error
        content, path = row[audio].get("bytes"), row[audio].get("path")
        name = str(row.get("id") or Path(path or f"{index:06d}").name)
        yield Item(name, str(row[text]).strip(), partial(_decode, name, content, path, rate))


def _decode(name: str, content: bytes | None, path: str | None, rate: int) -> Waveform:
    if content is None and path is None:
        raise bad_audio(name, "the dataset has no audio for it", "leave it out of the dataset")
    if content is None and "://" in str(path):
        import fsspec

        with fsspec.open(path, "rb") as file:
            content = file.read(LISTS)  # more than any recording that is taken
    return read_audio(Path(str(path)) if content is None else io.BytesIO(content), rate, name=name)


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a revision, or the revision itself when the Hub cannot be asked."""
    from convert.publishing.hub import client, recoverable, text_of

    with client(30.0, False) as api:
        try:
            return text_of(api.dataset_info(name, revision=revision).sha)
        except recoverable():
            return revision  # `load_dataset` has a cache, and reports what is wrong
