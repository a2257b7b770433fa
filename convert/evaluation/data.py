"""Speech with its transcripts: what every source of it hands out, and how a recording is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from convert.errors import ConvertError, Problem
from convert.evaluation.packages import require


@dataclass(frozen=True, slots=True)
class Dataset:
    """What was measured on, as a model card's `model-index` names it.

    Args:
        type: the Hub's name of the dataset, or `fairseq-manifest`, `folder` or `local` for one's own data.
        name: a name for people: of the dataset, the manifest or the folder, without its path.
        config: the dataset's configuration, such as `clean`.
        split: the dataset's split, such as `test`.
        revision: the dataset's commit, or for one's own data the SHA-256 over names, samples and transcripts.
    """

    type: str
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Utterance:
    """One recording with what was said.

    Args:
        index: its place in the dataset, from 0.
        name: what it is called there.
        samples: float32 array of shape (samples,), not normalised.
        text: the reference transcript.
    """

    index: int
    name: str
    samples: Any
    text: str

    def digest(self) -> str:
        """The SHA-256 of the samples."""
        return hashlib.sha256(self.samples.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """An utterance that was not read yet."""

    name: str
    text: str
    read: Callable[[], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A dataset to go through once.

    Args:
        dataset: its identity; the revision is None where it is a digest that is known only at the end.
        items: its utterances, in order.
        count: how many there are, as far as that is known beforehand.
        local: whether its revision is the digest of its content.
    """

    dataset: Dataset
    items: Iterator[Item]
    count: int | None
    local: bool

    def utterances(self, rank: int = 0, processes: int = 1) -> Iterator[Utterance]:
        """Read every utterance, or those whose index leaves `rank` when divided by `processes`."""
        for index, item in enumerate(self.items):
            if index % processes == rank:
                yield Utterance(index, item.name, item.read(), item.text)

    def described(self, digest: str) -> Dataset:
        """The dataset's identity, with the digest of its content as the revision of one's own data."""
        return replace(self.dataset, revision=f"sha256:{digest}") if self.local else self.dataset


def read_audio(name: str, file: Path | BinaryIO, rate: int) -> Any:
    """Read a recording as it stands: never resampled, never mixed down.

    Args:
        name: what to call it in errors.
        file: the file, or its bytes.
        rate: the sampling rate that the model was trained with, in Hz.

    Returns:
        A float32 numpy array of shape (samples,), as fairseq's `RawAudioDataset` reads it.

    Raises:
        ConvertError: the file is no audio, or has another sampling rate or several channels.
    """
    soundfile = require("soundfile")
    try:
        samples, found = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise ConvertError(f"{name}: cannot be read as audio: {error}", code="audio", key=name) from error
    if found != rate:
        raise ConvertError(
            f"{name}: its sampling rate is {found} Hz, the model's is {rate} Hz; nothing was resampled",
            code="sampling-rate",
            key=name,
            hint=f"convert the recordings first, for example: sox IN.wav -r {rate} OUT.wav",
        )
    if samples.shape[1] != 1:
        raise ConvertError(
            f"{name}: {samples.shape[1]} channels, expected 1; nothing was mixed",
            code="channels",
            key=name,
            hint="write one channel to a file of its own, for example: sox IN.wav OUT.wav remix 1",
        )
    return samples[:, 0]


def refuse(what: str, problems: list[Problem], hint: str = "") -> None:
    """Raise one error for all problems of a dataset, if there are any."""
    if problems:
        raise ConvertError(what, code=problems[0].code, key=problems[0].key, problems=problems, hint=hint)
