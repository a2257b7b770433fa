"""The way back: from a Hugging Face wav2vec 2.0 directory to a checkpoint that fairseq's own loader takes."""

from __future__ import annotations

import functools
import itertools
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.checkpoint.dictionary import SPECIAL, Dictionary
from convert.checkpoint.stacks import stack
from convert.checkpoint.writer import NewTensor, write_checkpoint
from convert.conversion import File, Record, differences
from convert.directory import ModelDirectory, Place
from convert.errors import MismatchError, PlanError, Problem
from convert.families import ARCHITECTURES, FAMILIES, Family, describe
from convert.families.base import NO_HEAD, FromConfig, Kind, Restoring
from convert.families.encoder_settings import ACTIVATIONS, FINE_TUNING, LAYER_SETTINGS
from convert.files import PIECE as CHUNK
from convert.files import WIDTHS, check_file, new_file, sha256_of
from convert.reading import open_file
from convert.request import request_again
from convert.rules import Table, TensorSpec
from convert.typed import Misfit, read

# What a model in transformers may still call the positional convolution's weight norm (before torch 2.1).
_ALIASES = {"conv.weight_g": "conv.parametrizations.weight.original0"}
_ALIASES["conv.weight_v"] = "conv.parametrizations.weight.original1"
_NEVER = -1e4  # the bias of symbols that fairseq's dictionary must have and the model never learned


@dataclass(frozen=True, slots=True)
class Restored:
    """A finished restoration.

    Args:
        path: the checkpoint.
        tensors: how many it holds.
        notes: what was made or changed on the way, for models that fairseq did not make.
    """

    path: Path
    tensors: int
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Draft:
    """What will be written: each tensor with the function that yields its bytes; the adapters of each language likewise.

    `settings`: the entries of the file that hold them. `teacher`: the teacher's name of each tensor that it shares with the
    model -> the model's name.
    """

    specs: dict[str, TensorSpec]
    bytes: dict[str, Callable[[], Iterator[bytes]]]
    settings: dict[str, Any]
    dictionary: Dictionary | None
    notes: list[str]
    dictionaries: tuple[Dictionary, ...] = ()
    languages: dict[str, _Draft] = field(default_factory=dict)
    teacher: dict[str, str] = field(default_factory=dict)
    restoring: Restoring = field(default_factory=Restoring)

    def new(self) -> dict[str, NewTensor]:
        """The tensors to write, under fairseq's names: adapters that it stacks are joined."""
        return {key: self._stacked(rows) if rows else self._new(key) for key, rows in stack(self.specs).items()}

    def _new(self, key: str) -> NewTensor:
        return NewTensor(self.specs[key].dtype, self.specs[key].shape, self.bytes[key])

    def _stacked(self, rows: Sequence[str]) -> NewTensor:
        spec = self.specs[rows[0]]
        if len(rows) == 1:
            return NewTensor(spec.dtype, (1, *spec.shape), self.bytes[rows[0]])
        return NewTensor(
            spec.dtype, (len(rows), *spec.shape), lambda: (part for row in rows for part in self.bytes[row]())
        )


def restore(model_dir: str | Path, out: str | Path, *, overwrite: bool = False) -> Restored:
    """Write a fairseq checkpoint from a Hugging Face model directory.

    Args:
        model_dir: a directory that this tool made (settings from `conversion.json`), or one that transformers saved
            (settings from `config.json`, vocabulary from `vocab.json`).
        out: the checkpoint to write.
        overwrite: whether an existing file is replaced, once the new one is proved.

    Returns:
        What was written. Every tensor was read back and compared byte for byte with the model's.

    Raises:
        ConvertError: `not-a-model`, `exists`.
        PlanError: the model has no fairseq counterpart; every reason is in `problems`.
    """
    out = Path(out)
    directory = ModelDirectory(Path(model_dir))
    check_file(out, overwrite)
    ours = os.path.lexists(directory.path / "conversion.json")
    draft = _from_conversion(directory) if ours else _from_config(directory)
    model = draft.new()
    restoring = draft.restoring
    teacher = {restoring.teacher: {name: model[key] for name, key in draft.teacher.items()}} if draft.teacher else {}
    history = {"criterion_name": "", "optimizer_name": "", "num_updates": 0, "best_loss": None}
    state: dict[str, Any] = {"args": None, "cfg": None, "criterion": None, "optimizer_history": [history]}
    state |= draft.settings
    state["task_state"] = {} if draft.dictionary is None else {"target_dictionary": draft.dictionary}
    state["task_state"] |= {"dictionaries": list(draft.dictionaries)} if draft.dictionaries else {}
    state |= {"extra_state": {}, "last_optimizer_state": None}
    if draft.languages:
        state["adapter"] = {
            name: {"model": part.new(), "task_state": {"target_dictionary": part.dictionary}}
            for name, part in draft.languages.items()
        }
    if restoring.bare:
        state = draft.settings
    count = len(model)
    with new_file(out, overwrite=overwrite) as path:
        write_checkpoint(path, {**model, **teacher}, state)
        del model, teacher, state  # of many languages, as much as the draft itself
        _prove(path, draft, directory if ours else None)
    return Restored(out, count, tuple(draft.notes))


def _prove(path: Path, draft: _Draft, directory: ModelDirectory | None) -> None:
    """Read the checkpoint back with the reader that knows nothing of the writer, and compare every byte.

    Args:
        path: the checkpoint.
        draft: what it was made from.
        directory: the directory that a conversion made: a conversion of the checkpoint has to give its settings again.
    """
    from convert.transfer import read_array

    with open_checkpoint(path) as opened:
        if directory is not None:
            _compare_settings(opened, directory)
        for name, part in {"": draft, **draft.languages}.items():
            if opened.inventory_of(name) != part.specs:
                raise MismatchError(f"{path.name} read back with other tensors; nothing was kept", code="read-back")
            for key, tensor in opened.tensors_of(name).items():
                if read_array(opened.container, tensor).tobytes() != b"".join(part.bytes[key]()):
                    raise MismatchError(f"{key} read back differently; nothing was kept", code="read-back", key=key)


def _compare_settings(opened: Checkpoint, directory: ModelDirectory) -> None:
    """Plan the conversion again: settings that it refuses, or makes something else of, are not those of a conversion."""
    again = replace(opened, settings=dict(directory.record.settings))  # as they were, the criterion's with them
    request = request_again(directory, again)
    if request.data_config is None:  # of several adapters, the one that was taken is now the model's own
        request = replace(request, language="")
    meant = describe(again, request).configuration
    if directory.record.dtype != "keep":
        meant["torch_dtype"] = directory.record.dtype
    problems = list(differences("config.json", meant, directory.config))
    if problems:
        raise PlanError(
            f"{directory.path}: conversion.json and config.json disagree about the model; nothing was written",
            code="changed",
            problems=problems,
            hint="convert the checkpoint again",
        )


def _read(directory: ModelDirectory, place: Place) -> Iterator[bytes]:
    with open_file(directory.path / place.file) as file:
        file.seek(place.start)
        for at in range(0, place.count, CHUNK):
            yield file.read(min(CHUNK, place.count - at))


def _from_conversion(directory: ModelDirectory) -> _Draft:
    record = directory.record
    family, kind = _known(record)
    if not family.restores:
        name = record.architecture.fairseq
        raise PlanError(
            f"{directory.path} was made from {name}, to which there is no way back; nothing was written",
            code="unsupported-architecture",
            key=name,
            hint="keep the checkpoint that it was made from",
        )
    constants = {drop.key: drop.constant for drop in record.drops if drop.constant is not None}
    kept = {source for sidecar in record.sidecars.values() for source in sidecar.tensors.values()}
    repeated = {drop.key: drop.repeats for drop in record.drops if drop.repeats}
    relics = {drop.key for drop in record.drops if drop.relic}
    kept |= repeated.keys() | constants.keys() | relics | {family.restoring.teacher}
    problems = [Problem("dropped", drop.key, drop.reason) for drop in record.drops if drop.key not in kept]
    if problems:
        asked = all(problem.detail == NO_HEAD for problem in problems)
        head = "pretraining" if "w2v_args" not in record.settings["model"] else "ctc"
        way = f"with its head (--head {head}, or no --head at all)" if asked else "with --keep-final-proj"
        raise PlanError(
            f"{directory.path} lacks tensors that fairseq's model needs; nothing was written",
            code="dropped",
            problems=problems,
            hint=f"convert the checkpoint again {way}",
        )
    notes = _changed(directory, record.files)
    notes += family.restoring.notes
    settings = (family.restoring.settings or _loadable)(record.settings)
    dictionary = None if kind.data_config else record.dictionary
    draft = _Draft({}, {}, settings, dictionary, notes, record.dictionaries, restoring=family.restoring)
    made = {fill.key for fill in record.fills}
    lost = list(made ^ record.tensors.keys() ^ directory.tensors.keys())
    for file, sidecar in record.sidecars.items():
        lost += [f"{file}: {target}" for target in sidecar.tensors.keys() - directory.places(file).keys()]
    lost += [source for source in repeated.values() if source not in record.tensors.values()]
    if lost:
        problems = [Problem("changed", key, "conversion.json and the weights disagree about it") for key in lost]
        raise PlanError(f"{directory.path} was changed since its conversion", code="changed", problems=problems)
    _take(draft, directory, directory.tensors, record.tensors, record)
    for file, sidecar in record.sidecars.items():  # what stands in one is as the checkpoint had it
        part = draft
        if sidecar.group:
            own = _Draft({}, {}, {}, record.languages.get(sidecar.group), notes)
            part = draft.languages.setdefault(sidecar.group, own)
        _take(part, directory, directory.places(file), sidecar.tensors)
    for source, other in repeated.items():
        draft.specs[source], draft.bytes[source] = replace(draft.specs[other], name=source), draft.bytes[other]
    for key, number in constants.items():
        draft.specs[key] = TensorSpec(key, (1,), "F32")
        draft.bytes[key] = lambda number=number: iter([struct.pack("<f", number)])  # type: ignore[misc]
    for old, new in family.restoring.renamed.items():
        for key in [key for key in draft.specs if key.startswith(old)]:
            name = new + key.removeprefix(old)
            draft.specs[name], draft.bytes[name] = replace(draft.specs.pop(key), name=name), draft.bytes.pop(key)
    draft.teacher = family.restoring.taught(draft.specs, record.settings["model"])
    return draft


def _known(record: Record) -> tuple[Family, Kind]:
    """Find the family that declares a record's architecture, and the kind of checkpoint."""
    name = record.architecture.fairseq
    if name not in ARCHITECTURES:
        raise PlanError(f"{name}: not an architecture that is converted", code="unsupported-architecture", key=name)
    return ARCHITECTURES[name]


def _take(
    draft: _Draft,
    directory: ModelDirectory,
    places: Mapping[str, Place],
    tensors: Mapping[str, str],
    record: Record | None = None,
) -> None:
    """Add the tensors of one file; of the weights, with the rows that the conversion edited or left out."""
    for target, name in tensors.items():
        source = sys.intern(name)  # each language has the same names
        spec, read = places[target].spec, functools.partial(_read, directory, places[target])
        rows = record.edited_rows.get(target) if record else None
        draft.specs[source] = TensorSpec(source, spec.shape, spec.dtype)
        draft.bytes[source] = read if rows is None else _with_rows(read, rows)
        if record and target in record.left_rows:
            _put_before(draft, source, bytes.fromhex(record.left_rows[target]))


def _put_before(draft: _Draft, source: str, data: bytes) -> None:
    """Put back the rows that the conversion left out, before the others."""
    spec, read = draft.specs[source], draft.bytes[source]
    rows = len(data) // (WIDTHS[spec.dtype] * math.prod(spec.shape[1:]))
    draft.specs[source] = TensorSpec(source, (spec.shape[0] + rows, *spec.shape[1:]), spec.dtype)
    draft.bytes[source] = lambda: itertools.chain((data,), read())


def _changed(directory: ModelDirectory, files: Mapping[str, File]) -> list[str]:
    """Hold the files against conversion.json: other weights are noted, other settings would be lost and are refused."""
    weights = {*directory.weight_files(), *directory.record.sidecars}
    notes, problems = [], []
    for name, kept in files.items():
        path = directory.path / name
        same = path.is_file() and sha256_of(path) == kept.sha256
        if not path.is_file() or (not same and name not in weights):
            problems.append(Problem("changed", name, "is not what the conversion wrote; the settings come from there"))
        elif not same:
            notes.append(f"{name} is not what the conversion wrote: its weights were restored as they are now")
    if problems:
        raise PlanError(
            f"{directory.path} was changed since its conversion; nothing was written",
            code="changed",
            problems=problems,
            hint="for a model that was trained on with transformers, remove conversion.json: then config.json counts",
        )
    return notes


def _with_rows(whole: Callable[[], Iterator[bytes]], rows: Mapping[str, str]) -> Callable[[], Iterator[bytes]]:
    """Put back the rows that the conversion edited."""

    def read() -> Iterator[bytes]:
        data = bytearray(b"".join(whole()))
        for row, text in rows.items():
            old = bytes.fromhex(text)
            data[int(row) * len(old) : (int(row) + 1) * len(old)] = old
        yield bytes(data)

    return read


def _loadable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as today's fairseq wants them: a plain `cfg`, whatever layout they came from."""

    def section(values: Mapping[str, Any]) -> dict[str, Any]:
        model = {key: value for key, value in values["model"].items() if key not in ("flat", "w2v_args")}
        if values["model"].get("flat"):  # a Namespace has the options of task, criterion and trainer too
            model = {key: value for key, value in model.items() if key in _of_model(values["model"])}
        if isinstance(values["model"].get("w2v_args"), dict):
            model["w2v_args"] = section(values["model"]["w2v_args"])
            inner = model["w2v_args"]["model"]  # 0.12.2 has them there only: today's defaults would replace its layers
            model = {name: inner[name] for name in LAYER_SETTINGS if inner.get(name) is not None} | model
        task = {"data": "", **values["task"]}
        _, kind = ARCHITECTURES.get(str(model.get("_name")), (None, Kind("")))
        task["_name"] = kind.task
        model |= {"_name": kind.restored} if kind.restored else {}
        if "w2v_args" in values["model"]:
            model.setdefault("data", "")
            model.setdefault("normalize", task.get("normalize", False))
        if kind.label_list and isinstance(task.get("labels"), str):  # in a Namespace, a list's text
            task["labels"] = [label.strip("[]'\" ") for label in task["labels"].split(",")]
        return {"model": model, "task": task, "criterion": None if "w2v_args" not in model else values["criterion"]}

    return {"cfg": {"_name": None, "common": {}, **section(settings)}}


def _of_model(model: Mapping[str, Any]) -> set[str]:
    """Name the settings that belong to a model, by its family, or by that of the encoder in it."""
    inner = model["w2v_args"]["model"] if isinstance(model.get("w2v_args"), dict) else model
    family, kind = ARCHITECTURES[str(inner.get("_name"))]
    fields = family.settings
    known = {"_name", *fields.same, *fields.read, *fields.training_only, *(limit.field for limit in fields.limits)}
    outer = ARCHITECTURES[str(model.get("_name"))][1]
    return known | {*kind.read} | ({*FINE_TUNING, *outer.read, "w2v_path"} if inner is not model else set())


@dataclass(frozen=True, slots=True)
class _Config:
    """The types of what is read of a config.json that transformers saved; what is absent has transformers' default."""

    conv_dim: tuple[int, ...]
    conv_kernel: tuple[int, ...]
    conv_stride: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_conv_pos_embeddings: int = 1
    num_conv_pos_embedding_groups: int = 1
    num_codevector_groups: int = 1
    num_codevectors_per_group: int = 1
    codevector_dim: int = 1
    proj_codevector_dim: int = 1
    pad_token_id: int | None = None
    conv_bias: bool = False
    apply_spec_augment: bool = False
    ctc_zero_infinity: bool = False
    feat_extract_norm: str = ""

    def __post_init__(self) -> None:
        convolutions = (self.conv_dim, self.conv_kernel, self.conv_stride)
        if not 0 < len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError("conv_dim")
        counts = {name: getattr(self, name) for name, kind in self.__annotations__.items() if kind == "int"}
        for name, count in [*counts.items(), *(("conv_dim", count) for counted in convolutions for count in counted)]:
            if not 0 < count < 2**31:
                raise ValueError(name)


def _from_config(directory: ModelDirectory) -> _Draft:
    config = directory.config
    family, way, head, problems = _from_class(config)
    if problems:
        raise PlanError(f"{directory.path} has no fairseq counterpart", code="unsupported", problems=problems)
    try:
        said = read(_Config, config)
        numbers = {key: config[key] for key in way.numbers if config.get(key) is not None}
        wrong = [
            key for key, value in numbers.items() if not isinstance(value, (int, float)) or not math.isfinite(value)
        ]
        if wrong or said.num_hidden_layers > len(directory.tensors):
            raise Misfit((*wrong, "num_hidden_layers")[0])
    except (Misfit, OverflowError) as error:
        message = f"{directory.path}: config.json: {error}: not what a {config['architectures'][0]} has"
        raise PlanError(message, code="bad-setting", key=str(error)) from None
    names = {_alias(name): name for name in directory.tensors}
    mask = f"{family.name}.masked_spec_embed"  # transformers has none without masking
    lm_head = directory.tensors.get("lm_head.bias")
    layout = way.layout(config, head, lm_head.spec.shape[0] if lm_head else 0)
    made = _table(family, layout, directory, names, mask)
    draft = _Draft({}, {}, {"cfg": _settings(way, head, directory)}, None, ["settings come from config.json"])
    for target, source in made.inverse.renames.items():
        if target == mask and target not in names:
            draft.specs[source] = TensorSpec(source, (config["hidden_size"],), "F32")
            draft.bytes[source] = lambda: iter([b"\0" * 4 * config["hidden_size"]])
            draft.notes.append(f"{source}: zeros, the model never masks")
            continue
        spec = directory.tensors[names[target]].spec
        draft.specs[source] = TensorSpec(source, spec.shape, spec.dtype)
        draft.bytes[source] = functools.partial(_read, directory, directory.tensors[names[target]])
    if head == "ctc":
        _vocabulary(directory, config, draft)
    return draft


def _alias(name: str) -> str:
    return next((name.removesuffix(old) + new for old, new in _ALIASES.items() if name.endswith(old)), name)


def _from_class(config: Mapping[str, Any]) -> tuple[Family, FromConfig, str, list[Problem]]:
    """Find the family and the kind of checkpoint of a class of transformers, and what of its configuration fairseq lacks."""
    ways = [(family, family.from_config) for family in FAMILIES.values() if family.from_config]
    known = {family.classes[kind]: (family, way, kind) for family, way in ways for kind in way.kinds}
    stated = config.get("architectures")
    named = [name for name in stated if name in list(known)] if isinstance(stated, list) else []
    family, way, head = known[named[0]] if named else (*ways[0], "")
    problems = []
    if config.get("model_type") != family.model_type or not head:
        found = f"{config.get('model_type')}, {config.get('architectures')}"
        problems.append(
            Problem("unsupported-architecture", "architectures", f"{', '.join(known)} expected, {found} found")
        )
    if config.get("add_adapter") or config.get("adapter_attn_dim"):
        problems.append(
            Problem(
                "unsupported-setting",
                "adapter",
                "adapters are restored from a directory of this tool, not from config.json",
            )
        )
    if config.get("hidden_act", "gelu") not in list(ACTIVATIONS.values()):
        problems.append(Problem("unsupported-setting", "hidden_act", f"{config.get('hidden_act')!r} has no equivalent"))
    if config.get("feat_extract_activation", "gelu") != "gelu" or config.get("layer_norm_eps", 1e-5) != 1e-5:
        problems.append(Problem("unsupported-setting", "feat_extract_activation, layer_norm_eps", "gelu and 1e-5 only"))
    return family, way, head, problems


def _table(family: Family, layout: Any, directory: ModelDirectory, names: Mapping[str, str], mask: str) -> Table:
    """Make the table of a transformers model, and hold it against the tensors that are there."""
    made = family.table(layout, "", ())
    problems = [Problem("missing-tensor", key, "is not in the model") for key in made.shapes if key not in names]
    problems = [problem for problem in problems if problem.key != mask]
    problems += [
        Problem("unexpected-tensor", key, "has no place in fairseq's model") for key in names.keys() - made.shapes
    ]
    for key, shape in made.shapes.items():
        if key in names and directory.tensors[names[key]].spec.shape != shape:
            found = directory.tensors[names[key]].spec.shape
            problems.append(Problem("shape", key, f"the model has {found}, config.json says {shape}"))
    for key in made.fills:  # equal widths: fairseq has no projection, so that the model's must do nothing
        if key in names and not _does_nothing(directory, names[key]):
            problems.append(
                Problem("projection", key, "fairseq has no projection between equal widths; this one is used")
            )
    if problems:
        raise PlanError(f"{directory.path} does not fit fairseq's model", code="incomplete", problems=problems)
    return made


def _does_nothing(directory: ModelDirectory, name: str) -> bool:
    import numpy as np

    spec = directory.tensors[name].spec
    if spec.dtype != "F32":
        return False
    value = np.frombuffer(directory.read(name), np.float32).reshape(spec.shape)
    return bool(np.array_equal(value, np.eye(*spec.shape) if len(spec.shape) == 2 else np.zeros(spec.shape)))


def _settings(way: FromConfig, head: str, directory: ModelDirectory) -> dict[str, Any]:
    """fairseq's settings from config.json; what it does not say has transformers' default."""
    features: dict[str, Any] = {}
    if (directory.path / "preprocessor_config.json").is_file():
        features = directory.json("preprocessor_config.json")
    elif (directory.path / "processor_config.json").is_file():
        features = directory.json("processor_config.json").get("feature_extractor", {})
    if not isinstance(features, dict) or not isinstance(features.get("do_normalize"), bool):
        raise PlanError(
            f"{directory.path} does not say whether its input is normalised (no preprocessor_config.json)",
            code="missing-setting",
            key="do_normalize",
            hint="save the model's feature extractor beside it",
        )
    return way.settings(directory.config, features, head)


def _vocabulary(directory: ModelDirectory, config: Mapping[str, Any], draft: _Draft) -> None:
    """Bring the vocabulary into fairseq's order: the blank first, then `<pad>`, `</s>`, `<unk>`, then the rest.

    A model whose vocabulary has that order keeps its head's bytes. Another one has its rows permuted, and rows that
    fairseq must have and the model does not get zeros and a bias that keeps them from ever being chosen.
    """
    ids = {token: index for token, index in directory.json("vocab.json").items() if isinstance(index, int)}
    rows = draft.specs["w2v_encoder.proj.bias"].shape[0]
    symbols = [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    blank = config.get("pad_token_id", 0)
    if sorted(ids.values()) != list(range(rows)) or blank not in range(rows):
        detail = f"vocab.json names {len(ids)} ids, the head has {rows} rows, config.json's pad_token_id is {blank}"
        raise PlanError(f"{directory.path}: {detail}", code="dictionary-size", key="vocab.json")
    if blank == 0 and len(symbols) > 4 and symbols[2:4] == list(SPECIAL[2:]) and set(symbols[:2]) == set(SPECIAL[:2]):
        symbols[:2] = SPECIAL[:2]
        draft.dictionary = Dictionary(tuple(symbols), (1,) * rows)
        return
    known = {"<s>": blank, "</s>": ids.get("</s>"), "<unk>": ids.get("<unk>", ids.get("[UNK]"))}
    order: list[int | None] = [known["<s>"], None, known["</s>"], known["<unk>"]]
    order += [index for index in range(rows) if index not in order]
    names = [*SPECIAL, *(symbols[index] for index in order[4:] if index is not None)]
    draft.dictionary = Dictionary(tuple(names), (1,) * len(names))
    draft.notes.append(f"the head's {rows} rows were brought into fairseq's order of {len(names)} symbols")
    for key, filler in (("w2v_encoder.proj.weight", 0.0), ("w2v_encoder.proj.bias", _NEVER)):
        spec = draft.specs[key]
        draft.specs[key] = TensorSpec(key, (len(order), *spec.shape[1:]), spec.dtype)
        draft.bytes[key] = _permuted(draft.bytes[key], spec, order, filler)


def _permuted(
    read: Callable[[], Iterator[bytes]], spec: TensorSpec, order: list[int | None], filler: float
) -> Callable[[], Iterator[bytes]]:
    def make() -> Iterator[bytes]:
        import numpy as np

        from convert.transfer import cast

        data = b"".join(read())
        width = len(data) // spec.shape[0]
        row = cast(np.full(width // WIDTHS[spec.dtype], filler, np.float32), "F32", spec.dtype)
        yield b"".join(row if index is None else data[index * width : (index + 1) * width] for index in order)

    return make
