"""Open a checkpoint: choose the model of a file, and take what belongs to it, from the file or from the base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.checkpoint import fairseq2, fairseq2_files
from convert.checkpoint.container import Container
from convert.checkpoint.contents import (
    Room,
    bytes_in,
    holds_numbers,
    is_array,
    read_dictionaries,
    read_dictionary,
    read_groups,
    read_tensors,
)
from convert.checkpoint.fairseq2_architectures import ASR
from convert.checkpoint.finding import Anchor, FoundSettings, State, fairseq_names, find_settings, parts_of, states
from convert.checkpoint.layouts import open_container
from convert.checkpoint.opened import UNSEEN, Base, Checkpoint
from convert.checkpoint.pickled import is_harmful
from convert.checkpoint.refusals import ambiguous, no_model, no_settings
from convert.checkpoint.settings import read_generation, read_settings
from convert.checkpoint.stored import StoredTensor
from convert.errors import CheckpointError, named_by
from convert.files import sha256_of

_SLACK = 64_000_000  # bytes that the views of a small file may need beyond the file's size
_TENSOR, _TENSORS = 64, 1000  # bytes of a file for each tensor in it, of which there may be some more


@dataclass(frozen=True, slots=True)
class Survey:
    """What a file holds, before anything is asked of it.

    Args:
        path, container: as of `Checkpoint`.
        top: its top level, by name; empty for a file that holds a module or a tensor alone.
        states: its state_dicts: those with a model, or else all that hold tensors; not averages.
        averages: the exponential moving averages among them.
    """

    path: Path
    container: Container
    top: Mapping[Any, Any]
    states: tuple[State, ...]
    averages: tuple[State, ...]

    def settings_of(self, state: State) -> FoundSettings:
        """Find the settings of one of its models.

        Raises:
            CheckpointError: `corrupted-settings`.
        """
        return find_settings(self.container.value, state, self.path.name)


def survey(path: str | Path, anchors: Sequence[Anchor]) -> Survey:
    """Open a file of tensors and say what is in it; close its container.

    Args:
        path: the file.
        anchors: what shows models in it.

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
        found = states(container.value, anchors)
        plain = tuple(state for state in found if not (state.is_average and state.roots))
        averages = tuple(state for state in found if state not in plain)
        # fairseq's own: beside it, `ema_fp32_params` is the same in a wider type
        averages = tuple(state for state in averages if state.where == "extra_state.ema") or averages
        alone = any(state.module and not state.where for state in found)
        return Survey(path, container, {} if alone else parts_of(container.value), plain, averages)
    except BaseException:
        container.close()
        raise


def open_checkpoint(
    path: str | Path,
    *,
    anchors: Sequence[Anchor] = (),
    base: str | Path | None = None,
    ema: bool = False,
    arch: str = "",
    normalize: bool | None = None,
    dictionary: str | Path | None = None,
) -> Checkpoint:
    """Open a checkpoint of a model that fairseq made, whoever wrote the file.

    Args:
        path: the file: of fairseq's trainer of any generation, of another program that has kept fairseq's names of the
            tensors, perhaps under a prefix, or of safetensors; or a folder of fairseq2's trainer, see `fairseq2_files.find_run`.
        anchors: what shows models in files of other programs, such as `convert.families.ANCHORS`; without, the model is where
            fairseq's trainer puts it.
        base: the pretrained checkpoint, whose settings count where this one has none; of fairseq2, a model.yaml or asset card.
        ema: whether the exponential moving average of the weights is taken, where the file has one.
        arch: the architecture that fairseq2 registers by this name, for its files without settings.
        normalize: whether waveforms were normalised, where the settings do not say it.
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
    run = fairseq2_files.find_run(Path(path))
    with contextlib.ExitStack() as stack:
        chosen = []
        for file in run.files:
            seen = survey(file, anchors)
            stack.callback(seen.container.close)
            state, prefix = _choose(seen, ema)
            chosen.append(_open(seen, state, prefix, ema))
        if prefix in state.roots and state.roots[prefix].trainer == "fairseq2":
            options = fairseq2.Options(_path(base), arch, _path(dictionary), normalize)
            made = _of_fairseq2(run, chosen, options)
        else:
            found = seen.settings_of(state)
            alone = _with_settings(_of_one_file(chosen, arch), found)
            based = _based(alone, _path(base), anchors)
            if not based.settings:
                raise no_settings(seen.path, state, prefix, found.where)
            made = _normalized(based, normalize)
        stack.pop_all()
    return made


def _path(named: str | Path | None) -> Path | None:
    return None if named is None else Path(named)


def _of_fairseq2(run: fairseq2_files.Run, parts: Sequence[Checkpoint], options: fairseq2.Options) -> Checkpoint:
    """Join the shards of a fairseq2 model, and take what belongs to it from the files beside it."""
    first, name = parts[0], run.path.name
    names = [*(first.prefix + key for key in first.tensors), *first.outside]
    family = fairseq2_files.family_of(names, name)
    container, tensors = fairseq2_files.join([(part.container, part.tensors) for part in parts], name)
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


def _of_one_file(parts: Sequence[Checkpoint], arch: str) -> Checkpoint:
    """Refuse what only checkpoints of fairseq2 have or need."""
    name = parts[0].path.name
    if len(parts) > 1:
        raise CheckpointError(
            f"{name} is one of several files, but not a fairseq2 shard", code="foreign-file", key=name
        )
    if arch:
        raise CheckpointError(
            f"{name} was not written by fairseq2, and --arch is for fairseq2 alone",
            code="usage",
            key="--arch",
            hint="leave --arch out",
        )
    return parts[0]


def _choose(seen: Survey, ema: bool) -> tuple[State, str]:
    """Choose the one model of a file, and the prefix of its names.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    name = seen.path.name
    if "shard_metadata" in seen.top or seen.top.get("fsdp_metadata"):
        raise CheckpointError(
            f"{name} is one shard of a model that was trained fully sharded; its tensors are flattened pieces",
            code="shard",
            key=name,
            hint="join the shards with fairseq's scripts/consolidate_fsdp_shards.py, then convert the result",
        )
    listed = seen.states
    if ema:
        listed = seen.averages
        if not listed:
            raise CheckpointError(
                f"{name} holds no exponential moving average of a model's weights; nothing was written",
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
    # of an architecture that is not supported, or damaged
    if isinstance(model, dict) and read_settings(seen.top, name) is not None:
        return State("model", model, {}, "", (model, seen.top)), ""
    raise no_model(seen.path, seen.container.value, seen.states)


def _open(seen: Survey, state: State, prefix: str, ema: bool) -> Checkpoint:
    """Take a model's tensors and dictionaries; its settings are missing still."""
    name, container = seen.path.name, seen.container
    room = Room(name, container.unpacked // _TENSOR + _TENSORS, container.unpacked)
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
    tensors = read_tensors(inside, room)
    if not tensors:
        arrays = any(map(is_array, inside.values()))
        raise CheckpointError(
            f"{name}: its model holds no tensor{', but arrays of numpy' if arrays else ''}; nothing was written",
            code="no-tensors",
            key=name,
            hint="save them as tensors: torch.from_numpy(array)" if arrays else "",
        )
    own = state.where.partition(".")[0]
    parts = {_printable(key): bytes_in(container, value) for key, value in seen.top.items() if key != own}
    groups = read_groups(state.holders, room)
    found = [*tensors.values(), *(tensor for group in groups.values() for tensor in group.tensors.values())]
    total = sum(math.prod(tensor.shape) * container.dtype(tensor)[1] for tensor in found)
    if total > 2 * container.unpacked + _SLACK:  # a view with stride 0 repeats one number as often as its shape says
        raise CheckpointError(
            f"{name}: its tensors would take {total} bytes, and the file has {container.unpacked}; nothing was written",
            code="size-bomb",
            key=name,
            hint="get the checkpoint from its author again: no trainer writes such views",
        )
    loose = {key: value for key, value in inside.items() if not isinstance(value, StoredTensor)}
    others = tuple(key for key, value in loose.items() if holds_numbers(value, name))
    return Checkpoint(
        path=seen.path,
        container=container,
        layout="",
        settings={},
        generation=next(filter(None, map(read_generation, state.holders)), {}),
        dictionary=read_dictionary(state.holders, room),
        tensors=tensors,
        others=others,
        parts={key: count for key, count in parts.items() if count and state.where},
        groups=groups,
        dictionaries=read_dictionaries(state.holders, room),
        where=state.where,
        prefix=prefix,
        inner=state.roots[prefix].inner if prefix in state.roots else "",
        outside=tuple(key for key in state.entries if not key.startswith(prefix)),
        aside=tuple(prefix + key for key in loose if key not in others),
        renamed=renamed,
        averages=tuple(average.where for average in seen.averages),
        notes=tuple(
            f"a moving average of the weights is in `{average.where}`: --ema takes it"
            for average in seen.averages
            if not ema
        ),
    )


def _with_settings(opened: Checkpoint, found: FoundSettings) -> Checkpoint:
    if found.values is None:
        return opened
    note = tuple(f"settings from `{where}` in the file" for where in found.where)
    return replace(opened, layout=found.layout, settings=found.values, notes=opened.notes + note)


def _based(opened: Checkpoint, base: Path | None, anchors: Sequence[Anchor]) -> Checkpoint:
    """Take the settings that are missing from the checkpoint that was named as base."""
    if opened.settings and not (opened.inner and not isinstance(opened.settings["model"].get("w2v_args"), dict)):
        note = () if base is None else (f"{base.name} was not needed: {opened.path.name} has its own settings",)
        return replace(opened, notes=opened.notes + note)
    if base is None:
        return opened
    with named_by("--base"):
        other = open_checkpoint(base, anchors=anchors)
    with other:
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
        shapes = f"their geometry is checked against the tensors' shapes; {UNSEEN} do not show in them"
        taken = f"settings from {base.name} (SHA-256 {found.sha256[:12]}…): {shapes}"
        opened = replace(opened, notes=(*opened.notes, taken))
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


def _normalized(opened: Checkpoint, normalize: bool | None) -> Checkpoint:
    """Say in the settings whether waveforms were normalised, where they do not.

    Raises:
        CheckpointError: `usage`: they say otherwise. Those of a base may be another model's, and give way.
    """
    if normalize is None:
        return opened
    option, task = "--normalize" if normalize else "--no-normalize", opened.settings["task"]
    if task.get("normalize") is not None and not (opened.base and opened.base.whole):
        if bool(task["normalize"]) == normalize:
            return opened
        message = f"{opened.path.name}: its settings say normalize = {task['normalize']}"
        raise CheckpointError(message, code="usage", key=option, hint=f"leave {option} out")
    note = f"normalize = {normalize}, as {option} says"
    settings = opened.settings | {"task": task | {"normalize": normalize}}
    return replace(opened, settings=settings, notes=(*opened.notes, note))


def _printable(key: object) -> str:
    return str(key) if str(key).isprintable() else ascii(key)
