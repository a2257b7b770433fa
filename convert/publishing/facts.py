"""What is known about a model, and from where: the only source of the model card."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, TypeVar

from convert.conversion import NAME as CONVERSION
from convert.conversion import Record
from convert.errors import ConvertError
from convert.families import Family, of_class
from convert.publishing.files import MODEL, Inventory
from convert.publishing.verified import EVALUATION, Evaluated, Result, Verified
from convert.typed import Misfit, read

if TYPE_CHECKING:
    from convert.fetching import Entry

# What a model class gives, by the end of its name.
_OUTPUTS = {
    "ForCTC": "ctc",
    "ForSequenceClassification": "labels",
    "ForConditionalGeneration": "generation",
    "SpeechEncoderDecoderModel": "generation",
}


@dataclass(frozen=True, slots=True)
class Paper:
    """A publication as a card cites it."""

    arxiv: str
    title: str
    authors: tuple[str, ...]
    year: int
    blog: str | None
    code: str | None
    facts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stated:
    """What a person says about the model, which no file knows; it wins over everything else."""

    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    catalogue: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """What a card says of config.json."""

    architectures: tuple[Annotated[str, re.compile(r"[A-Za-z]\w{0,80}", re.ASCII)], ...] = ("",)
    model_type: Annotated[str, re.compile(r"[\w-]{0,40}", re.ASCII)] = ""
    classifier_proj_size: int | None = None


@dataclass(frozen=True, slots=True)
class Features:
    """What a card says of preprocessor_config.json."""

    sampling_rate: int = 16000
    do_normalize: bool | None = None
    return_attention_mask: bool | None = None
    num_mel_bins: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a card may say. `None` and empty mean unknown, and are left out."""

    repo_id: str
    pin: str | None  # the tag that the snippets load; None where no tag can be set
    class_name: str
    model_type: str
    joined: bool  # whether the class's configuration says how wide the kept pretraining head is
    features: Features | None
    record: Record
    verification: Verified | None
    evaluation: tuple[Result, ...]
    entry: Entry | None
    license: str | None
    language: tuple[str, ...]
    datasets: tuple[str, ...]
    base_model: str | None
    papers: tuple[Paper, ...]
    sample: str | None
    letters: bool
    stated: frozenset[str]

    @property
    def verified(self) -> bool:
        """Whether a verification of exactly these bytes passed."""
        return self.verification is not None

    @property
    def family(self) -> Family | None:
        """The family of the model's class."""
        return of_class(self.class_name, self.record.architecture.fairseq)

    @property
    def project(self) -> str:
        """The repository of the project whose trainer wrote the checkpoint."""
        return self.family.trainer if self.family else "facebookresearch/fairseq"

    @property
    def trainer(self) -> str:
        """The name of that project."""
        return self.project.rpartition("/")[2]

    @property
    def output(self) -> str:
        """What the model gives: `ctc` (text, a symbol a frame), `generation` (text, token by token), `labels`, `hidden`."""
        return next((output for end, output in _OUTPUTS.items() if self.class_name.endswith(end)), "hidden")

    @property
    def ctc(self) -> bool:
        """Whether the model writes text, a symbol a frame."""
        return self.output == "ctc"

    @property
    def text(self) -> bool:
        """Whether the model writes text."""
        return self.output in ("ctc", "generation")

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that have an adapter of their own."""
        names = (re.fullmatch(r"adapter\.([\w-]+)\.safetensors", name) for name in self.record.files)
        return tuple(sorted(match[1] for match in names if match))

    def compared(self, name: str) -> bool:
        """Whether a value of conversion.json was compared: a card that says "verified" repeats no other."""
        return self.verification is None or f"{CONVERSION}: {name}" not in self.verification.skipped

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint: the one that it had when it was verified, for it may have been renamed before."""
        return self.verification.checkpoint.name if self.verification else self.record.source.name

    @property
    def tool(self) -> str:
        """What made the conversion, with its version."""
        return f"fairseq-to-hf {self.record.tool.version}" if self.compared("tool.version") else "fairseq-to-hf"

    @property
    def title(self) -> str:
        """The released model's title, else the repository's name."""
        return self.entry.title if self.entry else self.repo_id.split("/")[-1]

    @property
    def unknown(self) -> tuple[str, ...]:
        """The metadata that nobody knows and the card therefore leaves out."""
        known = {
            "license": self.license,
            "language": self.language,
            "datasets": self.datasets,
            "base_model": self.base_model,
        }
        return tuple(name for name, value in known.items() if not value)


@functools.cache
def papers() -> Mapping[str, Paper]:
    """Return the publications that cards cite, by arXiv number."""
    rows = json.loads(files("convert.publishing").joinpath("papers.json").read_text("utf-8"))
    return {
        number: Paper(number, **row | {"authors": tuple(row["authors"]), "facts": tuple(row["facts"])})
        for number, row in rows.items()
    }


def digest(inventory: Inventory) -> str:
    """Return a name of what `from_pretrained` reads: 12 hexadecimal digits over the model files' names and hashes."""
    lines = [f"{name} {file.sha256}\n" for name, file in sorted(inventory.files.items()) if MODEL.fullmatch(name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def gather(
    inventory: Inventory,
    repo_id: str,
    *,
    verification: Verified | None,
    pin: str | None,
    stated: Stated,
) -> Facts:
    """Collect what is known about the model.

    Args:
        inventory: the model directory.
        repo_id: where it will be.
        verification: the passed verification of exactly these bytes, `None` when there is none.
        pin: the tag that will name the published revision.
        stated: what a person says.

    Raises:
        ConvertError: the catalogue does not know the name, or knows other bytes by it; a file holds something else.
    """
    record = inventory.record()
    config = _read(Config, inventory, "config.json") or Config()
    # of a checkpoint that was fetched by its name, `verify` has compared the name; unverified, it is a claim of a file
    fetched = record.source.catalogue if verification else ""
    entry = _entry(record.source.sha256, stated.catalogue) or _known(fetched)
    class_name = next(iter(config.architectures), "")
    family = of_class(class_name, record.architecture.fairseq)
    numbers = dict.fromkeys([family.paper if family else "", (entry.citation if entry else None) or ""])
    language = stated.language or ((entry.language or ()) if entry else ())
    vocabulary, evaluation = inventory.json("vocab.json"), inventory.json(EVALUATION)
    return Facts(
        repo_id=repo_id,
        pin=pin,
        class_name=class_name,
        model_type=config.model_type,
        joined=config.classifier_proj_size is not None,
        features=_read(Features, inventory, "preprocessor_config.json"),
        record=record,
        verification=verification,
        evaluation=Evaluated.of(evaluation).results if evaluation is not None else (),
        entry=entry,
        license=stated.license or (entry.license.lower() if entry and entry.license else None),
        language=tuple(language),
        datasets=stated.datasets or (entry.datasets if entry else ()),
        base_model=stated.base_model or (entry.base_model if entry else None),
        papers=tuple(papers()[number] for number in numbers if number in papers()),
        sample=next((name for name in ("sample.flac", "sample.wav") if name in inventory.files), None),
        letters=isinstance(vocabulary, dict) and {"|", "E", "T", "A"} <= vocabulary.keys(),
        stated=frozenset(name for name in ("license", "language", "datasets", "base_model") if getattr(stated, name)),
    )


T = TypeVar("T")


def _read(kind: type[T], inventory: Inventory, name: str) -> T | None:
    value = inventory.json(name)
    try:
        return None if value is None else read(kind, value)
    except Misfit as error:
        message = f"{name}: {error}: not what a model of transformers has; nothing was sent"
        raise ConvertError(message, code="not-a-model", key=name, hint="convert the checkpoint again") from None


def _entry(sha256: str, name: str | None) -> Entry | None:
    from convert.fetching import catalogue

    entries = catalogue()
    if name is None:  # never by the file's name: two different files are often called checkpoint_best.pt
        found = [entry for entry in entries.values() if _sha256(entry) and _sha256(entry) == sha256]
        return found[0] if found else None
    if name not in entries:
        message = f"no released checkpoint is called {name!r}"
        raise ConvertError(message, code="unknown-name", key=name, hint="all names: fairseq-to-hf fetch --list")
    known = _sha256(entries[name])
    if known and known != sha256:
        detail = f"the catalogue's {name} has sha256 {known[:12]}…, this model was made from {sha256}"
        raise ConvertError(detail, code="catalogue", key=name, status=1)
    return entries[name]


def _known(name: str) -> Entry | None:
    from convert.fetching import catalogue

    return catalogue().get(name)


def _sha256(entry: Entry) -> str | None:
    value = getattr(entry, "sha256", None)  # the catalogue knows it for some
    return str(value) if value else None
