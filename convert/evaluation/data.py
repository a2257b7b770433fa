"""Recordings with transcripts, as every source of them returns them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from convert.audio import Waveform
from convert.errors import ConvertError, Problem


@dataclass(frozen=True, slots=True)
class Dataset:
    """What was measured on, as a model card's `model-index` names it.

    Args:
        type: the Hub's name of the dataset; `fairseq-manifest`, `folder` or `local` for local data.
        name: a readable name: of the dataset, the manifest or the folder, without its path.
        config: the dataset's configuration, such as `clean`.
        split: the dataset's split, such as `test`.
        revision: the dataset's commit; for local data the SHA-256 over names, samples and transcripts.
    """

    type: str
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Utterance:
    """One recording with its reference transcript.

    Args:
        index: its place in the dataset, from 0.
        name: its name in the dataset.
        samples: float32, shape (samples,), not normalised.
        text: the reference transcript.
    """

    index: int
    name: str
    samples: Waveform
    text: str

    @property
    def digest(self) -> str:
        """The SHA-256 of the samples."""
        return hashlib.sha256(self.samples.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """An utterance that has not been read yet."""

    name: str
    text: str
    read: Callable[[], Waveform]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A dataset, to be read once.

    Args:
        dataset: its identity; `revision` is None where it is a digest that is known only at the end.
        items: its utterances, in order.
        count: how many there are, if that is known beforehand.
        local: whether its revision is the digest of its content.
    """

    dataset: Dataset
    items: Iterator[Item]
    count: int | None
    local: bool

    def utterances(self, rank: int = 0, processes: int = 1) -> Iterator[Utterance]:
        """Read every utterance whose index modulo `processes` is `rank`."""
        for index, item in enumerate(self.items):
            if index % processes == rank:
                yield Utterance(index, item.name, item.read(), item.text)

    def identified(self, digest: str) -> Dataset:
        """Return the dataset's identity, with the digest of its content as the revision of local data."""
        return replace(self.dataset, revision=f"sha256:{digest}") if self.local else self.dataset


def refuse(message: str, problems: list[Problem], hint: str = "") -> None:
    """Raise one error for all problems of a dataset, if there are any."""
    if problems:
        raise ConvertError(message, code=problems[0].code, key=problems[0].key, problems=problems, hint=hint)
