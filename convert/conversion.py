"""conversion.json: written from a plan, and read as a whole, key by key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from convert.checkpoint.dictionary import SPECIAL, Dictionary
from convert.checkpoint.settings import TooLargeError, plain_data
from convert.errors import ConvertError, Problem
from convert.report import parse_json
from convert.typed import Misfit, read

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint
    from convert.families import Conversion, Request

NAME = "conversion.json"
DTYPES = {
    "keep": "keep",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}  # what is asked for, in safetensors' words
# A name in the directory itself, and never a path.
FileName = Annotated[str, re.compile(r"[A-Za-z0-9_][\w.-]{0,200}", re.ASCII)]
Extra = Annotated[str, re.compile(r"[A-Za-z0-9_][\w.-]{0,200}\.safetensors", re.ASCII)]
Language = Annotated[str, re.compile(r"[\w-]{1,80}", re.ASCII)]
Row = Annotated[str, re.compile("[0-9]{1,9}")]
Hexadecimal = Annotated[str, re.compile("([0-9a-f]{2})*")]
Sha256 = Annotated[str, re.compile("[0-9a-f]{64}")]
Version = Annotated[str, re.compile(r"[0-9A-Za-z.+-]{1,40}|")]


@dataclass(frozen=True, slots=True)
class Tool:
    """What made the conversion."""

    name: Version = ""
    version: Version = ""


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that the model was made from; `convert.checkpoint.Checkpoint` explains `where` and `prefix`."""

    name: str = ""
    size: int = 0
    sha256: str = ""
    container: str = ""
    layout: str = ""
    where: str = "model"
    prefix: str = ""
    address: str = ""
    catalogue: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint that settings were taken from; see `convert.checkpoint.Base`."""

    name: str
    sha256: Sha256
    whole: bool


@dataclass(frozen=True, slots=True)
class Architecture:
    """fairseq's name of the architecture, and what was made of it."""

    fairseq: str
    head: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What the conversion was asked for; `convert.families.Request` explains it."""

    closed: ClassVar[bool] = True
    head: str | None = None
    keep_final_proj: bool = False
    language: str | None = None
    data_config: Mapping[str, Any] | None = None
    post_process: str = ""
    ema: bool = False
    arch: str = ""
    normalize: bool | None = None

    @property
    def opening(self) -> dict[str, Any]:
        """The arguments of `open_checkpoint` among it."""
        return {"ema": self.ema, "arch": self.arch, "normalize": self.normalize}


@dataclass(frozen=True, slots=True)
class Dropped:
    """A tensor that was left out; see `convert.rules.Drop`."""

    key: str
    reason: str
    constant: float | None = None
    repeats: str = ""
    relic: bool = False


@dataclass(frozen=True, slots=True)
class Filled:
    """A tensor that a rule made; see `convert.rules.Fill`."""

    key: str
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Edited:
    """A row that was changed; see `convert.rules.Edit`."""

    key: str
    row: int
    rule: str
    value: float
    reason: str


@dataclass(frozen=True, slots=True)
class Extras:
    """A file of further tensors: their group in the checkpoint, and fairseq's name of each."""

    group: str
    tensors: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class File:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """What conversion.json says: what a model was made from, and how.

    Fields that earlier versions did not write have a default value.

    Args:
        settings: fairseq's, with the sections `model`, `task` and `criterion`.
        tensors: fairseq's name of each tensor of the weights.
        edited_rows: of each tensor that was edited, the bytes of its rows as they were, in hexadecimal.
        left_rows: of each tensor, the bytes of the rows before those that were taken.
        sidecars: the files of further tensors.
        files: every file that the conversion wrote, but this one.
        values: the whole file, as it is.
    """

    architecture: Architecture
    drops: tuple[Dropped, ...]
    dtype: Annotated[str, re.compile("|".join(DTYPES))]
    files: Mapping[FileName, File]
    fills: tuple[Filled, ...]
    settings: Mapping[str, Any]
    tensors: Mapping[str, str]
    base: Base | None = None
    dictionaries: tuple[Dictionary, ...] = ()
    dictionary: Dictionary | None = None
    edited_rows: Mapping[str, Mapping[Row, Hexadecimal]] = field(default_factory=dict)
    edits: tuple[Edited, ...] = ()
    language: str = ""
    languages: Mapping[Language, Dictionary] = field(default_factory=dict)
    left_rows: Mapping[str, Hexadecimal] = field(default_factory=dict)
    request: Asked | None = None
    sidecars: Mapping[Extra, Extras] = field(default_factory=dict)
    source: Source = Source()
    tool: Tool = Tool()
    training_only: Mapping[str, Any] = field(default_factory=dict)
    values: Any = None

    def __post_init__(self) -> None:
        dictionaries = {f"languages.{name}": kept for name, kept in self.languages.items()}
        dictionaries |= {f"dictionaries[{index}]": kept for index, kept in enumerate(self.dictionaries)}
        dictionaries |= {"dictionary": self.dictionary} if self.dictionary else {}
        for name, kept in dictionaries.items():
            if len(kept.symbols) != len(kept.counts) or not {*kept.special} <= {*kept.symbols[: len(SPECIAL)]}:
                raise ValueError(name)
        asked = self.request.data_config if self.request else None
        for name, value in (("settings", self.settings), ("request.data_config", asked or {})):
            try:
                plain_data(value)
            except TooLargeError:
                raise ValueError(name) from None
        _check_sections(self.settings, "settings")

    @classmethod
    def of(cls, content: bytes) -> Record:
        """Read the bytes of conversion.json.

        Raises:
            ConvertError: `not-a-model`: it is not what a conversion writes, with the first key that is wrong.
        """
        try:
            values = parse_json(content, NAME, _Shared().of)
            return read(cls, values | {"values": values} if isinstance(values, dict) else values)
        except ConvertError as error:
            reason = error.message
        except Misfit as error:
            reason = f"{NAME}: {error}: not what a conversion writes"
        raise ConvertError(reason, code="not-a-model", key=NAME, hint="convert the checkpoint again")

    @property
    def asked(self) -> Asked:
        """What the conversion was asked for, as far as an earlier version kept it."""
        return self.request or Asked(head=self.architecture.head)


class _Shared:
    """Makes one object of those that map the same texts to the same: each of 1,000 languages names the same tensors."""

    def __init__(self) -> None:
        self.known: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}

    def of(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return the object with these keys and values."""
        if not pairs or any(type(value) is not str for _, value in pairs):
            return dict(pairs)
        return self.known.setdefault(tuple(pairs), dict(pairs))


def _check_sections(settings: Any, name: str) -> None:
    for section in ("model", "task", "criterion"):
        if not isinstance(settings.get(section), dict):
            raise ValueError(f"{name}.{section}")
    if isinstance(settings["model"].get("w2v_args"), dict):
        _check_sections(settings["model"]["w2v_args"], f"{name}.model.w2v_args")
    for key in settings.keys() - {"model", "task", "criterion"}:
        raise ValueError(f"{name}.{key[:60]}")


def record_of(
    opened: Checkpoint,
    model: Conversion,
    request: Request,
    digest: str,
    dtype: str,
    files: Mapping[str, Any],
    version: str,
) -> dict[str, Any]:
    """Make the content of conversion.json: nothing in it is private or volatile.

    Args:
        opened: the checkpoint.
        model: the plan of its conversion.
        request: what was asked for.
        digest: the checkpoint's SHA-256.
        dtype: `keep`, or what the weights are rounded to.
        files: size and SHA-256 of every file, by name.
        version: the version of this tool.
    """
    return {
        "schema": 1,
        "tool": {"name": "fairseq-to-hf", "version": version},
        "source": {
            "name": opened.path.name.encode("utf-8", "backslashreplace").decode(),  # file names may be any bytes
            "size": opened.size,
            "sha256": digest,
            "container": opened.container.kind,
            "layout": opened.layout,
            **_place(opened, digest),
        },
        **({} if opened.base is None else {"base": asdict(opened.base)}),
        "architecture": {"fairseq": model.fairseq, "class": model.target, "head": model.head},
        "request": without_paths(request.record),
        "settings": without_paths(_named(opened, model.fairseq)),
        "training_only": without_paths(dict(model.training_only)),
        "config": {value.name: value.origin for value in model.config},
        "dictionary": None if model.dictionary is None else _symbols(model.dictionary),
        "dictionaries": [_symbols(dictionary) for dictionary in opened.dictionaries],
        "language": model.language,
        "languages": {name: _symbols(dictionary) for name, dictionary in model.languages.items()},
        "decoding": model.processor.decoding,
        "table": {"name": model.plan.table.name, "digest": model.plan.table.digest},
        "tensors": {target: source for source, target in model.plan.renames.items()},
        "drops": [drop.record for drop in model.drops],
        "fills": [fill.record for fill in model.plan.fills],
        "edits": [edit.record for edit in model.plan.table.edits],
        "edited_rows": _edited_rows(opened, model),
        "left_rows": _left_rows(opened, model, dtype),
        "sidecars": {
            sidecar.file: {
                "group": sidecar.group,
                "tensors": {target: source for source, target in sidecar.plan.renames.items()},
            }
            for sidecar in model.sidecars
        },
        "dtype": dtype,
        "files": dict(files),
    }


def _named(opened: Checkpoint, architecture: str) -> dict[str, Any]:
    """Return the settings, with the model's name among those of unilm's files, which leave it out."""
    settings = opened.settings
    named = settings["model"] | ({"_name": architecture} if opened.layout == "unilm" else {})
    return {**settings, "model": named}


def _place(opened: Checkpoint, digest: str) -> dict[str, Any]:
    """Where the model is in its file, if that is not where fairseq's trainer puts it; where the file is from, if known."""
    made = {"where": opened.where, "prefix": opened.prefix, "renamed": dict(opened.renamed)}
    usual: dict[str, Any] = {"where": "model", "prefix": "", "renamed": {}, "address": "", "catalogue": ""}
    if opened.origin is not None and opened.origin.sha256 in ("", digest):
        made |= {"address": opened.origin.address, "catalogue": opened.origin.catalogue}
    return {key: value for key, value in made.items() if value != usual[key]}


def _symbols(dictionary: Dictionary) -> dict[str, Any]:
    return {name: list(getattr(dictionary, name)) for name in ("symbols", "counts", "special")}


def _edited_rows(opened: Checkpoint, model: Conversion) -> dict[str, dict[str, str]]:
    """The bytes of every row that is edited as they were before, in hexadecimal, for the way back."""
    from convert.pieces import read_array

    sources = {target: source for source, target in model.plan.renames.items()}
    tensors = opened.over(model.group)
    kept: dict[str, dict[str, str]] = {}
    for edit in model.plan.table.edits:
        before: bytes = read_array(opened.container, tensors[sources[edit.target]])[edit.row].tobytes()
        kept.setdefault(edit.target, {})[str(edit.row)] = before.hex()
    return kept


def _left_rows(opened: Checkpoint, model: Conversion, dtype: str) -> dict[str, str]:
    """The bytes of the rows before those that a tensor takes, of the same type as it, in hexadecimal, for the way back."""
    from convert.pieces import cast, read_array

    sources = {target: source for source, target in model.plan.renames.items()}
    left: dict[str, str] = {}
    for target, count in model.plan.table.skips.items():
        rows = read_array(opened.container, opened.over(model.group)[sources[target]])[:count]
        kind = model.plan.target[target].dtype
        left[target] = cast(rows, kind, kind if dtype == "keep" else DTYPES[dtype]).hex()
    return left


def without_paths(value: Any) -> Any:
    """Keep only the last component of every path in settings: the rest is somebody's machine.

    Example:
        >>> without_paths({"data": "/home/me/manifests", "w2v_path": "base.pt"})
        {'data': 'manifests', 'w2v_path': 'base.pt'}
    """
    if isinstance(value, dict):
        return {key: without_paths(child) for key, child in value.items()}
    if isinstance(value, list):
        return [without_paths(child) for child in value]
    if isinstance(value, str) and not value.isspace():
        parts = value.replace("\\", "/").split("/")
        return parts[-1] or (parts[-2] if len(parts) > 1 else "") if len(parts) > 1 else value
    return value


def differences(name: str, expected: Any, found: Any, key: str = "") -> Iterator[Problem]:
    """Name the values of a JSON file that are not what they should be.

    Example:
        >>> [str(problem) for problem in differences("config.json", {"a": {"b": 1}}, {"a": {"b": 2}})]
        ['config.json: a.b is 2, expected 1']
    """
    inside: Any
    if isinstance(expected, dict) and isinstance(found, dict):
        inside = sorted({*expected, *found})
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        inside = range(len(expected))
    else:
        if json_text(expected) != json_text(found):
            yield Problem("file", name, f"{key or 'the whole'} is {_short(found)}, expected {_short(expected)}")
        return
    for part in inside:
        inner = f"{key}[{part}]" if isinstance(part, int) else f"{key}.{part}" if key else part
        if part not in found and not isinstance(part, int):
            yield Problem("file", name, f"{inner} is missing, expected {_short(expected[part])}")
        elif part not in expected and not isinstance(part, int):
            yield Problem("file", name, f"{inner} is {_short(found[part])}, expected nothing")
        elif expected[part] is not found[part]:
            yield from differences(name, expected[part], found[part], inner)


def json_text(value: object) -> str:
    """Write a value so that two are equal only if they are of one type: to Python, `True == 1 == 1.0`."""
    return json.dumps(value, sort_keys=True)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
