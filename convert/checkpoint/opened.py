"""An opened checkpoint: tensors under fairseq's own names, settings and dictionaries, whoever wrote the file."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.checkpoint import fairseq2
from convert.checkpoint.container import Container, tensors_in
from convert.checkpoint.dictionary import Dictionary, from_pickle, from_symbols, is_dictionary
from convert.checkpoint.fairseq2_architectures import ASR
from convert.checkpoint.finding import FAIRSEQ2, State, fairseq_names, states
from convert.checkpoint.layouts import open_container
from convert.checkpoint.pickled import is_harmful
from convert.checkpoint.refusals import ambiguous, no_model, no_settings
from convert.checkpoint.settings import read_generation, read_settings
from convert.checkpoint.stacks import is_unstacked, stacked, unstack
from convert.checkpoint.stored import StoredTensor, Stub
from convert.errors import CheckpointError
from convert.files import sha256_of
from convert.rules import TensorSpec

_SLACK = 64_000_000  # bytes that the views of a small file may need beyond the file's size
_TENSOR, _TENSORS = 64, 1000  # bytes of a file for each tensor in it, of which there may be some more


@dataclass(frozen=True, slots=True)
class Group:
    """Further tensors of a checkpoint, such as one language's adapter of an MMS file.

    Args:
        tensors: where each tensor is.
        dictionary: the target dictionary that belongs to them, or `None`.
    """

    tensors: dict[str, StoredTensor]
    dictionary: Dictionary | None


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
        others: entries of the model that are not tensors, such as a teacher's dict of them.
        parts: the bytes of the tensors beside the model, by top-level key, such as the optimizer's state.
        groups: the adapters of MMS files by language.
        dictionaries: those of a pretraining, whose symbols are the numbers of clusters.
        where: the keys that lead to the state_dict, joined by dots; empty for the top.
        prefix: what stands before fairseq's names in it.
        inner: what stands before the encoder's names in fairseq's: empty for a pretrained model.
        outside: names in the state_dict that do not start with the prefix: they belong to another model.
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


@dataclass(frozen=True, slots=True)
class Survey:
    """What a file holds, before anything is asked of it.

    Args:
        path, container: as of `Checkpoint`.
        top: its top level; empty for a file that holds a module, a list or a tensor alone.
        states: its state_dicts: those with a model, or else all that hold tensors; not averages.
        averages: the exponential moving averages among them.
        layout, settings: as of `Checkpoint`; `None` without settings.
    """

    path: Path
    container: Container
    top: Mapping[Any, Any]
    states: tuple[State, ...]
    averages: tuple[State, ...]
    layout: str
    settings: dict[str, Any] | None


def survey(path: str | Path) -> Survey:
    """Open a file of tensors and say what is in it; close its container.

    Raises:
        CheckpointError: the file cannot be read, is something else, or tries to do something on loading.
    """
    path = Path(path)
    container = open_container(path)
    try:
        # a name with dots walks attributes, `torch` and `os.system`; trainers name classes of modules only
        harmful = sorted(str(name) for name in container.globals if is_harmful(str(name)) or "." in name.name)
        if harmful:
            raise CheckpointError(
                f"{path.name}: its pickle wants to call {', '.join(harmful[:5])}; it was not executed, and nothing was written",
                code="hostile-pickle",
                key=harmful[0],
                hint="do not open this file with torch.load or fairseq; get the checkpoint from its author again",
            )
        top = container.value if isinstance(container.value, dict) else {}
        found = states(container.value)
        layout, settings = read_settings(top, path.name) or ("", None)
        plain = tuple(state for state in found if not (state.is_average and state.roots))
        averages = tuple(state for state in found if state not in plain)
        # fairseq's own: beside it, `ema_fp32_params` is the same in a wider type
        averages = tuple(state for state in averages if state.where == "extra_state.ema") or averages
        return Survey(path, container, top, plain, averages, layout, settings)
    except BaseException:
        container.close()
        raise


def open_checkpoint(
    path: str | Path,
    *,
    base: str | Path | None = None,
    ema: bool = False,
    arch: str = "",
    normalize: bool | None = None,
    dictionary: str | Path | None = None,
) -> Checkpoint:
    """Open a checkpoint of a model that fairseq made, whoever wrote the file.

    Args:
        path: the file: of fairseq's trainer of any generation, of another program that has kept fairseq's names of the
            tensors, perhaps under a prefix, or of safetensors; or a folder of fairseq2's trainer, see `fairseq2.find_run`.
        base: the pretrained checkpoint, whose settings count where this one has none; of fairseq2, a model.yaml or asset card.
        ema: whether the exponential moving average of the weights is taken, where the file has one.
        arch: the architecture that fairseq2 registers by this name, for its files without settings.
        normalize: whether waveforms were normalised, for checkpoints of fairseq2 that lie without their config.yaml.
        dictionary: for checkpoints of fairseq2, the tokenizer's sentencepiece model; others may be given one later.

    Returns:
        The checkpoint, mapped; no tensor byte is read. Close it, or use it in a `with` statement.

    Raises:
        CheckpointError: the file cannot be read, is something else, or tries to do something on loading.

    Example:
        >>> with open_checkpoint("checkpoints/espeak-wav2vec2-ctc.pt") as checkpoint:
        ...     checkpoint.settings["model"]["_name"]
        'wav2vec_ctc'
    """
    run = fairseq2.find_run(Path(path))
    with contextlib.ExitStack() as stack:
        parts = []
        for file in run.files:
            seen = survey(file)
            stack.callback(seen.container.close)
            parts.append(_open(seen, ema))
        if FAIRSEQ2 in parts[0].tensors:
            options = fairseq2.Options(_path(base), arch, _path(dictionary), normalize)
            made = _of_fairseq2(run, parts, options)
        else:
            made = _complete(seen, _based(_of_one_file(parts, arch, normalize), _path(base)))
        stack.pop_all()
    return made


def _path(named: str | Path | None) -> Path | None:
    return None if named is None else Path(named)


def _of_fairseq2(run: fairseq2.Run, parts: Sequence[Checkpoint], options: fairseq2.Options) -> Checkpoint:
    """Join the shards of a model of fairseq2's, and take what belongs to it from the files beside it."""
    first, name = parts[0], run.path.name
    names = [*(first.prefix + key for key in first.tensors), *first.outside]
    family = fairseq2.family_of(names, name)
    container, tensors = fairseq2.join([(part.container, part.tensors) for part in parts], name)
    settings, base = fairseq2.read_settings(run, family, options)
    file = fairseq2.find_tokenizer(run, options) if family == ASR else None
    dictionary, tokenizer = None, b""
    if file is not None:
        dictionary, settings["task"]["tokenizer"], tokenizer = fairseq2.read_tokenizer(file)
    return replace(
        first,
        path=run.path,
        container=container,
        tensors=tensors,
        layout="fairseq2",
        settings=settings,
        dictionary=dictionary,
        tokenizer=tokenizer,
        base=None if base is None else Base(base.name, sha256_of(base), True),
    )


def _of_one_file(parts: Sequence[Checkpoint], arch: str, normalize: bool | None) -> Checkpoint:
    """Refuse what only checkpoints of fairseq2 have or need."""
    name = parts[0].path.name
    if len(parts) > 1:
        raise CheckpointError(
            f"{name} is one of several files, and not a shard of fairseq2's", code="foreign-file", key=name
        )
    if arch or normalize is not None:
        option = "--arch" if arch else "--normalize" if normalize else "--no-normalize"
        raise CheckpointError(
            f"{name} was not made by fairseq2, whose checkpoints alone {option} is for",
            code="usage",
            key=option,
            hint=f"leave {option} out",
        )
    return parts[0]


def _open(seen: Survey, ema: bool) -> Checkpoint:
    """Choose the model of a file, and take its tensors and dictionaries; the settings may be missing still."""
    name, container, top = seen.path.name, seen.container, seen.top
    if "shard_metadata" in top or top.get("fsdp_metadata"):
        raise CheckpointError(
            f"{name} is one shard of a model that was trained fully sharded; its tensors are flattened pieces",
            code="shard",
            key=name,
            hint="join the shards with fairseq's scripts/consolidate_fsdp_shards.py, then convert the result",
        )
    state, prefix = _choose(seen, ema)
    room = _Room(name, container.unpacked // _TENSOR + _TENSORS, container.unpacked)
    strange = [key for key in state.entries if not isinstance(key, str) or not key.isprintable()]
    if strange:
        raise CheckpointError(
            f"{name}: its model names a tensor {ascii(strange[0])[:60]}, which is not text; nothing was written",
            code="corrupted-model",
            key=name,
        )
    inside = {key.removeprefix(prefix): value for key, value in state.entries.items() if key.startswith(prefix)}
    renamed = fairseq_names(inside)
    names = {old: new for new, old in renamed.items()}
    inside = {names.get(key, key): value for key, value in inside.items()}
    tensors = _tensors(inside, room)
    if not tensors:
        raise CheckpointError(f"{name}: its model holds no tensor", code="no-tensors", key=name)
    groups = _groups(top, room)
    found = [*tensors.values(), *(tensor for group in groups.values() for tensor in group.tensors.values())]
    total = sum(math.prod(tensor.shape) * container.dtype(tensor)[1] for tensor in found)
    if total > 2 * container.unpacked + _SLACK:  # a view with stride 0 repeats one number as often as its shape says
        raise CheckpointError(
            f"{name}: its tensors would take {total} bytes, and the file has {container.unpacked}; nothing was written",
            code="size-bomb",
            key=name,
            hint="get the checkpoint from its author again: no trainer writes such views",
        )
    own = state.where.partition(".")[0]
    parts = {_printable(key): _bytes_in(container, value) for key, value in top.items() if key != own}
    return Checkpoint(
        path=seen.path,
        container=container,
        layout=seen.layout,
        settings=seen.settings or {},
        generation=read_generation(top),
        dictionary=_dictionary(top, room),
        tensors=tensors,
        others=tuple(key for key, value in inside.items() if not isinstance(value, StoredTensor)),
        parts={key: count for key, count in parts.items() if count and state.where},
        groups=groups,
        dictionaries=_dictionaries(top, room),
        where=state.where,
        prefix=prefix,
        inner=state.roots.get(prefix, ""),
        outside=tuple(key for key in state.entries if not key.startswith(prefix)),
        renamed=renamed,
        averages=tuple(average.where for average in seen.averages),
        notes=tuple(
            f"a moving average of the weights is in `{average.where}`: --ema takes it"
            for average in seen.averages
            if not ema
        ),
    )


def _choose(seen: Survey, ema: bool) -> tuple[State, str]:
    """Choose the one model of a file, and the prefix of its names.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    listed = seen.states
    if ema:
        listed = seen.averages
        if not listed:
            raise CheckpointError(
                f"{seen.path.name} holds no exponential moving average of a model's weights; nothing was written",
                code="no-ema",
                key="--ema",
                hint="leave --ema out",
            )
    models = [(state, prefix) for state in listed for prefix in state.roots]
    if len(models) > 1:
        raise ambiguous(seen.path, models)
    if models:
        return models[0]
    model = seen.top.get("model")
    if isinstance(model, dict) and seen.settings is not None:  # of an architecture that is not supported, or damaged
        return State("model", model, {}, ""), ""
    raise no_model(seen.path, seen.container.value, seen.states)


def _based(opened: Checkpoint, base: Path | None) -> Checkpoint:
    """Take the settings that are missing from the checkpoint that was named as base."""
    if opened.settings and not (opened.inner and not isinstance(opened.settings["model"].get("w2v_args"), dict)):
        note = () if base is None else (f"{base.name} was not needed: {opened.path.name} has its own settings",)
        return replace(opened, notes=opened.notes + note)
    if base is None:
        return opened
    with open_checkpoint(base) as other:
        pretrained = other.settings
        if other.inner:
            pretrained = other.settings["model"].get("w2v_args")
            if not isinstance(pretrained, dict):
                raise CheckpointError(
                    f"{base.name} was fine-tuned itself, and does not hold the settings of its pretrained model; nothing was written",
                    code="no-base-settings",
                    key="--base",
                    hint="pass the pretrained checkpoint that it was made from",
                )
        found = Base(base.name, other.sha256(), not opened.settings)
        shapes = "their geometry is held against the tensors' shapes; heads and strides do not show in those"
        told = f"settings from {base.name} (SHA-256 {found.sha256[:12]}…): {shapes}"
        opened = replace(opened, notes=(*opened.notes, told))
        if opened.settings:  # `w2v_args` alone is missing
            model = {**opened.settings["model"], "w2v_args": pretrained}
            return replace(opened, settings=opened.settings | {"model": model}, base=found)
        if not opened.inner:
            settings = pretrained
        elif other.inner == opened.inner:
            settings = other.settings
        else:  # fine-tuned from it: what only fine-tuning decides is not known, and has fairseq's defaults
            settings = {"model": {"w2v_args": pretrained}, "task": dict(pretrained["task"]), "criterion": {}}
    return replace(opened, settings=settings, layout="base", base=found)


def _complete(seen: Survey, opened: Checkpoint) -> Checkpoint:
    if not opened.settings:
        state = next(one for one in (*seen.states, *seen.averages) if one.where == opened.where)
        raise no_settings(seen.path, state, opened.prefix)
    return opened


@dataclass(slots=True)
class _Room:
    """How much a file of its size can hold: what stands in a pickle once may be named in it a million times.

    Args:
        name: the file's name, for errors.
        tensors: how many more tensors, adapters that are stacked counted one by one.
        letters: how many more letters of dictionaries.
    """

    name: str
    tensors: int
    letters: int

    def take(self, tensors: int = 0, letters: int = 0) -> None:
        """Use some of it.

        Raises:
            CheckpointError: `size-bomb`, when there is not so much.
        """
        self.tensors -= tensors
        self.letters -= letters
        if self.tensors < 0 or self.letters < 0:
            what = "tensors" if self.tensors < 0 else "symbols"
            raise CheckpointError(
                f"{self.name}: it names more {what} than a file of its size holds; nothing was written",
                code="size-bomb",
                key=self.name,
                hint="get the checkpoint from its author again: no trainer writes such files",
            )


def _tensors(model: dict[Any, Any], room: _Room) -> dict[str, StoredTensor]:
    """Take the tensors; adapters that are stacked for several languages one by one."""
    found = {name: value for name, value in model.items() if isinstance(value, StoredTensor)}
    room.take(tensors=sum(max(1, stacked(name, tensor.shape)) for name, tensor in found.items()))
    strange = next((name for name in found if is_unstacked(name)), None)
    if strange is not None:
        raise CheckpointError(
            f"{room.name}: its model names a tensor {strange}, as only an adapter out of a stack is called here",
            code="corrupted-model",
            key=strange,
        )
    return unstack(found, lambda tensor: tensor.shape, _row)


def _row(tensor: StoredTensor, index: int) -> StoredTensor:
    offset = tensor.offset + index * tensor.stride[0]
    return replace(tensor, offset=offset, shape=tensor.shape[1:], stride=tensor.stride[1:])


def _groups(top: Mapping[Any, Any], room: _Room) -> dict[str, Group]:
    """Read `adapter`, which the MMS files hold: language -> its tensors and its dictionary."""
    found = top.get("adapter")
    if not isinstance(found, dict):
        return {}
    groups = {}
    for language, part in found.items():
        model = part.get("model") if isinstance(part, dict) else None
        strange = not isinstance(language, str) or not re.fullmatch(r"[\w-]{1,80}", language, re.ASCII)
        if strange or not isinstance(model, dict) or not all(map(_is_tensor, model.items())):
            raise CheckpointError(
                f"{room.name}: its adapter of {ascii(language)[:60]} is not a language's tensors; nothing was written",
                code="corrupted-model",
                key=room.name,
            )
        groups[language] = Group(_tensors(model, room), _dictionary(part, room))
    return groups


def _is_tensor(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[0], str) and entry[0].isprintable() and isinstance(entry[1], StoredTensor)


def _bytes_in(container: Container, value: Any) -> int:
    return sum(
        container.storages[key].count
        for key in {tensor.storage.key for tensor in tensors_in(value, container.path.name)}
    )


def _dictionary(top: Mapping[Any, Any], room: _Room) -> Dictionary | None:
    """Find the target dictionary: in `task_state`, where fairseq keeps it, or alone at the top."""
    state = top.get("task_state")
    inside = state.get("target_dictionary") if isinstance(state, dict) else None
    beside = [value for value in top.values() if is_dictionary(value)]
    return _symbols(inside if inside is not None or len(beside) != 1 else beside[0], room)


def _dictionaries(top: Mapping[Any, Any], room: _Room) -> tuple[Dictionary, ...]:
    """Find the dictionaries of a pretraining: in `task_state`, or where s3prl keeps their symbols."""
    state, symbols = top.get("task_state"), top.get("dictionaries_symbols")
    listed = state.get("dictionaries") if isinstance(state, dict) else None
    if isinstance(symbols, list) and all(map(_is_texts, symbols)):
        room.take(letters=sum(1 + len(symbol) for one in symbols for symbol in one))
        return tuple(from_symbols(one, room.name) for one in symbols)
    found = [_symbols(value, room) for value in listed] if isinstance(listed, list) else []
    whole = [dictionary for dictionary in found if dictionary is not None]
    return tuple(whole) if len(whole) == len(found) else ()


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _symbols(value: Any, room: _Room) -> Dictionary | None:
    state = value.state if isinstance(value, Stub) and isinstance(value.state, dict) else {}
    symbols = state.get("symbols")
    if isinstance(symbols, list):
        room.take(letters=sum(1 + len(symbol) if isinstance(symbol, str) else 1 for symbol in symbols))
    return from_pickle(value, room.name)


def _printable(key: Any) -> str:
    return str(key) if str(key).isprintable() else ascii(key)
