"""What a family of models is, what a conversion is asked for, what it is decided from, and what is decided."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convert.checkpoint import Anchor, Checkpoint
from convert.checkpoint.data_config import DataConfig
from convert.checkpoint.dictionary import Dictionary
from convert.errors import Problem
from convert.families.damages import Converted, Damage, encoder_damages
from convert.families.settings import Reader, Settings, Value
from convert.families.tokenizers import Processor
from convert.planner import Plan
from convert.rules import Drop, Edit, Fill, Rename, Table

if TYPE_CHECKING:
    from convert.families.interface import Interface

Shapes = Mapping[str, tuple[int, ...]]
KEPT_HEAD = "final_proj.safetensors"  # the file of `--keep-final-proj`
NO_HEAD = "belongs to the head, and the bare encoder was asked for"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model's geometry. This one, of a part that a model does not have, names nothing."""

    @property
    def axes(self) -> Mapping[str, Sequence[object]]:
        """The values of the axes that only this part's rules name."""
        return {}

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes of the dimensions that only this part's rules name."""
        return {}


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
class Conversion:
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
        language: the language of the weights, where the checkpoint names it.
        group: where that language's tensors are, a key of `Checkpoint.groups`; empty for those of the model.
        languages: the dictionaries of all languages that the model directory has, where there are several.
        left_out: what stands beside the model in the checkpoint, and belongs to another one.
        notes: what else people should know of the checkpoint.
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
    notes: tuple[str, ...] = ()

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
    def chosen(self) -> list[str]:
        """Say for people which of several languages the weights are of, and how to change it."""
        if not self.languages:
            return []
        others = f"{len(self.languages)} languages: the weights are of {self.language}"
        return [f"{others}; target_lang=... and load_adapter(...) of transformers change it, --lang takes one alone"]


@dataclass(frozen=True, slots=True)
class Language:
    """One language of a checkpoint that has several, or names its only one.

    Args:
        name: as fairseq's users choose it.
        group: where its tensors are: a key of `Checkpoint.groups`, or empty for those of the model.
        row: which of the stacked adapters it is.
        dictionary: its symbols.
    """

    name: str
    group: str
    row: int
    dictionary: Dictionary | None


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
        post_process: fairseq's name of how text is made of symbols, in place of the recipe's.
        ema, arch, normalize: how the checkpoint was opened.
    """

    head: str = ""
    dictionary: Dictionary | None = None
    training_only: Sequence[str] = ()
    keep_final_proj: bool = False
    language: str = ""
    data_config: DataConfig | None = None
    post_process: str = ""
    ema: bool = False
    arch: str = ""
    normalize: bool | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What `conversion.json` keeps of it, so that the same can be asked for again."""
        made: dict[str, Any] = {"head": self.head, "keep_final_proj": self.keep_final_proj, "language": self.language}
        made |= {"post_process": self.post_process} if self.post_process else {}
        made |= {"ema": True} if self.ema else {}
        made |= {"arch": self.arch} if self.arch else {}
        made |= {} if self.normalize is None else {"normalize": self.normalize}
        return made if self.data_config is None else made | {"data_config": dict(self.data_config.values)}


@dataclass(slots=True)
class Sources:
    """What a conversion is decided from.

    Args:
        checkpoint: the opened checkpoint.
        request: what the caller asks for.
        name: fairseq's name of the architecture.
        kind: the kind of checkpoint.
        family: the family of the encoder, or of the whole model.
        head: the head that is converted, `encoder` for none.
        reader: the settings of the encoder, with what fine-tuning replaced.
        outer: the settings of the model as they stand; those of the encoder too, unless it was fine-tuned.
        task: the settings of the task.
        dictionary: the target dictionary, once it was read.
    """

    checkpoint: Checkpoint
    request: Request
    name: str
    kind: Kind
    family: Family
    head: str
    reader: Reader
    outer: Reader
    task: Reader
    dictionary: Dictionary | None = None

    @property
    def criterion(self) -> Mapping[str, Any]:
        """The settings of the criterion."""
        found: Mapping[str, Any] = self.checkpoint.settings["criterion"]
        return found

    @property
    def problems(self) -> list[Problem]:
        """What was found wrong so far; one list for all readers."""
        return self.reader.problems

    def refuse(self, code: str, key: str, detail: str, hint: str = "") -> None:
        """Add a reason to refuse the conversion, with its remedy where there is one."""
        self.problems.append(Problem(code, key, detail, hint))


def _nothing(sources: Sources) -> list[Any]:
    return []


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of checkpoint: what it adds to its encoder.

    Args:
        name: such as `ctc`; the head's name.
        rules: the tensors of its head, with complete keys on both sides; none where transformers has no class for it.
        drops: what is left out when the head is; by default what `rules` names.
        mark: a regular expression that is found in a key of such a checkpoint, to name what its settings do not.
        layout: the layout of settings that such checkpoints alone have, to name what those do not.
        ranks: the number of axes of the tensors that `measure` reads.
        measure: reads the head's geometry off names and shapes.
        state: states it from the settings, given what `measure` read.
        nested: whether the encoder's settings are in `w2v_args`.
        read: settings of the model, beside those of the encoder, that are read by name.
        symbols: the tensor with one row for each symbol of the dictionary; empty without one.
        text: whether the symbols spell text; otherwise they are labels, and none of them is special.
        values: the values of `config.json` that only this kind has.
        edits: changes of single rows of its head.
        from_config: what it adds to each section of the settings (`model`, `criterion`, `task`), of `config.json`; `None` where
            there is no way back from what transformers saved.
        data_config: whether the task's config.yaml belongs to it.
        task: what today's fairseq calls the task of such a checkpoint.
        label_list: whether that task has a list of labels.
        restored: fairseq's name of what the way back makes, where that is another.
        damages: mistakes in its head that a verification must catch, by name; none for a model without this head.
    """

    name: str
    rules: tuple[Rename, ...] = ()
    drops: tuple[Drop, ...] = ()
    mark: str = ""
    layout: str = ""
    ranks: Mapping[str, int] = field(default_factory=dict)
    measure: Callable[[Shapes], Part] = lambda shapes: Part()
    state: Callable[[Sources, Part], Part] = lambda sources, seen: seen
    nested: bool = False
    read: frozenset[str] = frozenset()
    symbols: str = ""
    text: bool = True
    values: Callable[[Sources], list[Value]] = _nothing
    edits: Callable[[Sources], list[Edit]] = _nothing
    from_config: Callable[[Reader], dict[str, dict[str, Any]]] | None = lambda config: {}
    data_config: bool = False
    task: str = "audio_pretraining"
    label_list: bool = False
    restored: str = ""
    damages: Callable[[Converted], Mapping[str, Damage]] = lambda model: {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoring:
    """What is particular to the way back: what fairseq's own loader insists on.

    Args:
        made: tensors that fairseq's pretrained model has beside its encoder, to be filled where only that is there; the keys
            are fairseq's.
        settings: makes the entries of the file that hold the settings, from those in `conversion.json`; by default one
            `cfg` as today's trainer writes it.
        bare: whether the file holds the settings and the tensors alone.
        renamed: what names of tensors start with in released files -> what they start with in today's.
        teacher: a dict of tensors among the tensors, which a conversion leaves out.
        taught: gives (names of the model, its settings) the teacher's names -> the model's.
        notes: what people should know.
    """

    made: tuple[Fill, ...] = ()
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    bare: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    teacher: str = ""
    taught: Callable[[Iterable[str], Mapping[str, Any]], dict[str, str]] = lambda names, settings: {}
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How transformers runs a converted model so that it does fairseq's sums, and where it cannot.

    Args:
        attention: the implementation of attention that does them, or that of each part of the model by name.
        usual: the implementation of users who ask for none, where that is another and the class has it.
        rounds: says by the configuration why the sums are others in the last bit; nothing where they are the same.
        unused: the stages of modules that are there, and that no output depends on.
    """

    attention: str | Mapping[str, str] = "sdpa"
    usual: str = ""
    rounds: Callable[[Any], str] = lambda config: ""
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of models: everything that is particular to it. Whatever is done for all goes through the registry.

    Args:
        name: the base prefix of transformers' classes, such as `wav2vec2`; what a layout's field `family` says.
        architectures: fairseq's name of a model -> the kind of checkpoint that it is.
        encoders: what the settings of its encoders say: (`_name`, `layer_type`).
        inside: of models that have an encoder of another family in them: the families that it may be of.
        refused: fairseq's name of a model that is not supported -> the reason.
        mark: a regular expression that is found in a key of this family's checkpoints, and of no other's.
        anchors: what shows its models in files of other programs, where they have not the encoder that most families share.
        general: whether `mark` is found in other families' checkpoints too, so that they are tried first.
        infer: reads the geometry off names and shapes.
        table: makes the table of (layout, head, edits).
        describe: decides everything about a conversion.
        model_type: what `config.json` calls it.
        classes: head -> transformers class; a kind of checkpoint that is not in it loses its head.
        kinds: the kinds of checkpoint that it has tensors for, by name.
        settings: the settings, each in its class.
        state: the geometry that only this family has, by (settings, the encoder's layout); `None` where it is refused.
        values: the values of `config.json` that only this family has.
        sidecars: the files of tensors that its classes have no place for.
        languages: lists the languages of a checkpoint by (checkpoint, settings of its encoder, problems), by name.
        convolutions: reads (channels, kernel, stride) of every convolution of its front end off the settings.
        restores: whether there is a way back from a conversion.
        pads: whether fairseq pads frames to a multiple, `required_seq_len_multiple`.
        restoring: what is particular to the way back.
        running: how transformers runs its models.
        from_config: for the way back from what transformers itself saved: the settings that `settings` does not translate, of
            `config.json`; `None` where there is no such way.
        trainer: the repository of the project whose trainer writes its checkpoints.
        paper: the arXiv number of what describes it, a key of `convert/publishing/papers.json`.
        splits_masks: whether fairseq cuts the mask of a padded batch into as many equal pieces as there are frames.
        generates: whether its models write text token by token.
        damages: mistakes in a converted model that a verification must catch, by name.
        interface: describes what surrounds a model of (sources, its conversion); by default what surrounds an encoder.
    """

    name: str
    architectures: Mapping[str, Kind] = field(default_factory=dict)
    encoders: tuple[tuple[str, str], ...] = ()
    inside: tuple[Family, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    mark: str
    anchors: tuple[Anchor, ...] = ()
    general: bool = False
    infer: Callable[[Shapes], Any]
    table: Callable[[Any, str, Iterable[Edit]], Table]
    describe: Callable[[Sources], Conversion]
    model_type: str
    classes: Mapping[str, str]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    settings: Settings
    state: Callable[[Sources, Any], Any] = lambda sources, layout: layout
    values: Callable[[Sources], list[Value]] = _nothing
    sidecars: Callable[[Sources], list[Sidecar]] = _nothing
    languages: Callable[[Checkpoint, Mapping[str, Any], list[Problem]], Mapping[str, Language]] | None = None
    convolutions: Callable[[Reader], Sequence[tuple[int, int, int]]] = lambda reader: reader.convolutions(
        "conv_feature_layers"
    )
    restores: bool = True
    pads: bool = True
    restoring: Restoring = Restoring()
    running: Running = Running()
    from_config: Callable[[Reader], dict[str, Any]] | None = None
    trainer: str = "facebookresearch/fairseq"
    paper: str = ""
    splits_masks: bool = False
    generates: bool = False
    damages: Callable[[Converted], Mapping[str, Damage]] = encoder_damages
    interface: Callable[[Sources, Conversion], Interface] | None = None

    def knows(self, names: Iterable[str]) -> bool:
        """Say whether a state_dict may be of this family, by its names alone."""
        pattern = re.compile(self.mark)
        return any(pattern.search(key) for key in names)
