"""An opened checkpoint: tensors under fairseq's own names, settings and dictionaries, whoever wrote the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.checkpoint.container import Container
from convert.checkpoint.contents import Group
from convert.checkpoint.dictionary import Dictionary
from convert.checkpoint.stored import StoredTensor
from convert.rules import TensorSpec

# what the settings of a base decide and the shapes of tensors do not show
UNSEEN = "the number of attention heads, the strides and the normalisation of waveforms"


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint whose settings were taken, because this one has none, or none of the model that it was fine-tuned from.

    Args:
        name: the file's name.
        sha256: of the file.
        whole: whether all settings are from there; otherwise those of `w2v_args`.
    """

    name: str
    sha256: str
    whole: bool


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file was fetched from.

    Args:
        address: without user, password and token.
        catalogue: its name in the catalogue of released checkpoints, or empty.
        sha256: of the bytes that came from there, or empty where that is not recorded.
        dictionary: the dictionary that lies beside it there.
    """

    address: str
    catalogue: str
    sha256: str
    dictionary: Path | None


@dataclass(slots=True)
class Checkpoint:
    """An opened fairseq checkpoint: everything but the tensors' bytes. Use it as a context manager.

    Args:
        path: the file.
        container: the mapped file.
        layout: how its settings are kept: `cfg` (plain dict), `omegaconf`, `args` (a flat Namespace), `unilm` (of the model alone),
            `s3prl`, or `base` (in another checkpoint).
        settings: the sections `model`, `task` and `criterion` as plain dicts.
        dictionary: the target dictionary of `task_state`, or `None`.
        tensors: where each tensor of the model is, by fairseq's name.
        others: entries of the model that hold numbers and are not tensors, such as a teacher's dict of them.
        parts: the bytes of the tensors beside the model, by top-level key, such as the optimizer's state.
        groups: the adapters of MMS files by language.
        dictionaries: those of a pretraining, whose symbols are the numbers of clusters.
        where: the keys that lead to the state_dict, joined by dots; empty for the top.
        prefix: what stands before fairseq's names in it.
        inner: what stands before the encoder's names in fairseq's: empty for a pretrained model.
        outside: names in the state_dict that do not start with the prefix: they belong to another model.
        aside: names of the other entries of the state_dict, such as texts and settings.
        renamed: fairseq's name -> the one in the file, of tensors that have another.
        base: where settings were taken from, if not from this file or, by fairseq2, from beside it.
        averages: where exponential moving averages of the weights are.
        notes: what else there is to say of it.
        origin: where the file was fetched from, if it was.
        tokenizer: the sentencepiece model that belongs to a checkpoint of fairseq2, as it is; empty without one.
        generation: how fairseq generates unless it is told otherwise, such as `beam`; empty where the file does not say.
    """

    path: Path
    container: Container
    layout: str
    settings: dict[str, Any]
    dictionary: Dictionary | None
    tensors: dict[str, StoredTensor]
    others: tuple[str, ...]
    parts: dict[str, int]
    groups: dict[str, Group] = field(default_factory=dict)
    dictionaries: tuple[Dictionary, ...] = ()
    where: str = "model"
    prefix: str = ""
    inner: str = ""
    outside: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    base: Base | None = None
    averages: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origin: Origin | None = None
    tokenizer: bytes = b""
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self.container.size

    @property
    def globals(self) -> tuple[str, ...]:
        """Every global that the file's pickle names, sorted."""
        return tuple(sorted(map(str, self.container.globals)))

    @property
    def inventory(self) -> dict[str, TensorSpec]:
        """Name, shape and dtype of every tensor of the model."""
        return self.inventory_of("")

    def tensors_of(self, group: str) -> dict[str, StoredTensor]:
        """Return where the tensors of a group are; of the model, if the name is empty."""
        return self.groups[group].tensors if group else self.tensors

    def over(self, group: str) -> dict[str, StoredTensor]:
        """Return where the model's tensors are once those of a group have replaced their namesakes."""
        return self.tensors | self.groups[group].tensors if group else self.tensors

    def inventory_of(self, group: str) -> dict[str, TensorSpec]:
        """Name, shape and dtype of every tensor of a group."""
        return {
            name: TensorSpec(name, tensor.shape, self.container.dtype(tensor)[0])
            for name, tensor in self.tensors_of(group).items()
        }

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuse what is done meanwhile, however it ends, if one of the files changes.

        Raises:
            CheckpointError: `changed`.
        """
        try:
            yield
        finally:
            self.container.check_unchanged()

    def check_bytes(self) -> None:
        """Refuse damaged tensors, of the model and of its languages, where the file says what its bytes should be.

        Raises:
            CheckpointError: `corrupted-entry`.
        """
        groups = (group.tensors.values() for group in self.groups.values())
        self.container.check_bytes(tensor for some in (self.tensors.values(), *groups) for tensor in some)

    def sha256(self) -> str:
        """Hash its files: of several, what `sha256sum` prints of them."""
        return self.container.sha256()
