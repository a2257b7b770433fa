"""What is decided about a conversion before a tensor byte is read, and what the caller asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.data_config import DataConfig, read_data_config
from convert.checkpoint.dictionary import Dictionary, from_file
from convert.mapping.rules import Drop, Plan
from convert.model.directory import ModelDirectory
from convert.model.processor import Processor

KEPT_HEAD = "final_proj.safetensors"  # the sidecar of `--keep-final-proj`


@dataclass(frozen=True, slots=True)
class Value:
    """One value of `config.json`, and where it came from."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A safetensors file beside the weights, of tensors that have no place in transformers' class.

    Args:
        file: its name.
        plan: its proved plan.
        group: the tensors' group in the checkpoint, a key of `Checkpoint.groups`; empty for those of `model`.
    """

    file: str
    plan: Plan
    group: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """All that a conversion will do, decided before a tensor byte is read.

    Args:
        fairseq: fairseq's name of the architecture.
        target: the transformers class.
        head: `encoder` for a model without its head, otherwise the kind of checkpoint, such as `ctc` or `pretraining`.
        plan: the proved plan of the tensors.
        config: the values of `config.json`.
        training_only: settings without a counterpart, that act while training only.
        processor: the vocabulary and the feature extractor.
        dictionary: fairseq's target dictionary, where there is one.
        sidecars: files of further tensors.
        language: the language that the weights speak, where the checkpoint names it.
        group: where that language's tensors are, a key of `Checkpoint.groups`; empty for those of the model.
        languages: the dictionaries of all languages that the model directory has, where there are several.
        left_out: what stands beside the model in the checkpoint, and belongs to another one.
    """

    fairseq: str
    target: str
    head: str
    plan: Plan
    config: tuple[Value, ...]
    training_only: Mapping[str, Any]
    processor: Processor
    dictionary: Dictionary | None
    sidecars: tuple[Sidecar, ...] = ()
    language: str = ""
    group: str = ""
    languages: Mapping[str, Dictionary] = field(default_factory=dict)
    left_out: tuple[Drop, ...] = ()

    @property
    def drops(self) -> tuple[Drop, ...]:
        """The checkpoint's tensors that are not among the weights."""
        return (*self.plan.drops, *self.left_out)

    @property
    def configuration(self) -> dict[str, Any]:
        """The content of `config.json`: a value named `decoder.d_model` is that of a part."""
        made: dict[str, Any] = {}
        for value in self.config:
            part, _, name = value.name.rpartition(".")
            (made.setdefault(part, {}) if part else made)[name] = value.value
        return made

    @property
    def dropped(self) -> list[Drop]:
        """What is in no file: not what stands in a sidecar, though the weights leave it out."""
        kept = {source for sidecar in self.sidecars if not sidecar.group for source in sidecar.plan.renames}
        return [drop for drop in self.drops if drop.source not in kept or drop in self.left_out]

    @property
    def kept(self) -> list[str]:
        """Say for people what stands beside the weights."""
        return [f"kept beside the model: {len(one.plan.renames)} tensors in {one.file}" for one in self.sidecars]

    @property
    def spoken(self) -> list[str]:
        """Say for people which language the weights speak, and how to change it, where there are several."""
        if not self.languages:
            return []
        others = f"{len(self.languages)} languages: the weights speak {self.language}"
        return [f"{others}; target_lang=... and load_adapter(...) of transformers change it, --lang takes one alone"]


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asks for beside the checkpoint.

    Args:
        head: `encoder`, a kind of checkpoint such as `ctc`, or empty for what the checkpoint is.
        dictionary: the dictionary of `--dict`.
        training_only: settings that the caller knows to act while training only.
        keep_final_proj: whether the pretraining head that transformers has no class for is kept in a sidecar.
        language: the one language of several: to take of adapters, or to translate into.
        data_config: the task's config.yaml with what it names, for a speech-to-text model.
        ema, arch, normalize: how the checkpoint was opened.
    """

    head: str = ""
    dictionary: Dictionary | None = None
    training_only: Sequence[str] = ()
    keep_final_proj: bool = False
    language: str = ""
    data_config: DataConfig | None = None
    ema: bool = False
    arch: str = ""
    normalize: bool | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What `conversion.json` keeps of it, so that the same can be asked for again."""
        made: dict[str, Any] = {"head": self.head, "keep_final_proj": self.keep_final_proj, "language": self.language}
        made |= {"ema": True} if self.ema else {}
        made |= {"arch": self.arch} if self.arch else {}
        made |= {} if self.normalize is None else {"normalize": self.normalize}
        return made if self.data_config is None else made | {"data_config": dict(self.data_config.values)}


def make_request(
    *,
    head: str | None = None,
    dictionary: str | Path | None = None,
    training_only: Sequence[str] = (),
    keep_final_proj: bool = False,
    language: str | None = None,
    data_config: str | Path | None = None,
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
        head or "", symbols, tuple(training_only), keep_final_proj, language or "", data, ema, arch, normalize
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
    )
    if made.dictionary is None and opened.dictionary is None:
        made = replace(made, dictionary=record.dictionary)
    return replace(made, data_config=directory.data_config)
