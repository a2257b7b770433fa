"""fairseq2's checkpoints: a run's folder, one step of it, its shards, or one file; and what lies beside them.

A file of fairseq2 holds tensors alone. The settings are in `model.yaml`, in an asset card, or in the architecture that a
card names; the tokenizer is a sentencepiece model; whether waveforms were normalised is in the run's `config.yaml`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.checkpoint.beside import read_beside, read_yaml
from convert.checkpoint.container import Container
from convert.checkpoint.dictionary import Dictionary, of_pieces
from convert.checkpoint.fairseq2_architectures import ARCHITECTURES, ASR, NORMALISED, PRETRAINED
from convert.checkpoint.sentencepiece import NORMAL, SentencePieceModel, read_model
from convert.checkpoint.stored import JoinedTensor, Storage, StoredTensor
from convert.errors import CheckpointError
from convert.reading import open_file

_SHARD = re.compile(r"sdp_(\d{2,})\.pt")
_STEP = re.compile(r"step_(\d+)")
_INSIDE = re.compile(r"tp_\d{2,}|pp_\d{2,}|model|step_\d+|checkpoints")  # folders of a run, from its files upwards
_NAMES = {"best": "best", "best_checkpoint": "best", "last": "last", "last_checkpoint": "last"}
_SQUARE = "encoder.layers.0.self_attn.q_proj.weight"  # as many rows as columns, whatever the geometry
# models that share keys with wav2vec 2.0 -> what they are
_OTHERS = {
    "llama_decoder.": "a language model on top of an encoder (wav2vec2_llama)",
    "text_frontend.": "a language model on top of an encoder (wav2vec2_llama)",
    "lang_embeddings.": "a language model on top of an encoder (wav2vec2_llama)",
    "encoder_proj.": "a language model on top of an encoder (wav2vec2_llama)",
    "w2v2_model.": "a w2v-BERT model",
}
_RENAMED = {"feature_gradient_scale": "feature_grad_scale"}  # 0.4 -> 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """Where a checkpoint of fairseq2 is.

    Args:
        path: the step's folder or the file, whose name is the checkpoint's.
        files: the model's files, in the order of their ranks.
        folders: where what belongs to them may lie, the nearest first.
    """

    path: Path
    files: tuple[Path, ...]
    folders: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """What a user says of a checkpoint whose folder does not.

    Args:
        card: a `model.yaml` or an asset card.
        architecture: the name of a registered architecture.
        tokenizer: a sentencepiece model.
        normalize: whether waveforms were normalised.
    """

    card: Path | None = None
    architecture: str = ""
    tokenizer: Path | None = None
    normalize: bool | None = None


# --- folders --------------------------------------------------------------------------------------------------------


def find_run(path: Path) -> Run:
    """Find the files of a checkpoint.

    Args:
        path: a run's folder, its `checkpoints`, a `step_N` or `model` inside, a shard, or `best` or `last` in place of a step;
            or any one file.

    Returns:
        Where it is.

    Raises:
        CheckpointError: the folder holds none, or several steps of which none was named, or only a part of one.
    """
    if path.is_file() and _SHARD.fullmatch(path.name):
        path = path.parent
    named = _NAMES.get(path.name) if not path.exists() and path.parent.is_dir() else None
    if not path.is_dir() and not named:
        return Run(path, (path,), tuple(_upwards(path.parent)))
    folder = path.parent if named else path
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    steps = {int(found[1]): one for one in folder.iterdir() if (found := _STEP.fullmatch(one.name)) and one.is_dir()}
    if steps:
        folder = steps[_step(folder, steps, named)]
    elif named:
        raise _bad(path, f"{path.parent.name} holds no step_N to choose from", "no-checkpoint")
    return _files(folder)


def _step(folder: Path, steps: Mapping[int, Path], named: str | None) -> int:
    scores = {number: score for number in steps if (score := _score(folder, number)) is not None}
    if named == "last" or (named is None and len(steps) == 1):
        return max(steps)
    if named == "best" and scores:
        return max((score, number) for number, score in scores.items())[1]
    listed = ", ".join(f"step_{n}" + (f" (score {scores[n]:g})" if n in scores else "") for n in sorted(steps))
    if named == "best":
        raise _bad(
            folder, f"{folder.name} holds no scores, so that none of its steps is the best: {listed}", "no-score"
        )
    raise _bad(
        folder,
        f"{folder.name} holds {len(steps)} steps: {listed}",
        "several-steps",
        f"name one of them: {folder.name}/step_{max(steps)}, or {folder.name}/best or {folder.name}/last",
    )


def _score(folder: Path, number: int) -> float | None:
    for file in (folder / "scores" / f"step_{number}.txt", folder / f"step_{number}" / "score.txt"):
        if file.is_file():
            try:
                with open_file(file) as opened:
                    return float(opened.read(100).split(b"\n")[0])
            except ValueError:
                raise _bad(file, f"{file.name} does not hold a score", "bad-score") from None
    return None


def _files(folder: Path) -> Run:
    """Find the model's files in a step's folder, or in one of those inside it."""
    inside = folder
    for name in ("model", "pp_00", "tp_00"):
        inside = inside / name if (inside / name).is_dir() else inside
    folders = tuple(_upwards(inside))
    path = next((one for one in folders if _STEP.fullmatch(one.name)), folder)
    for outer in folders:
        several = (
            [one.name for one in outer.iterdir() if one.name in ("pp_01", "tp_01")] if outer != path.parent else []
        )
        if several:
            raise _bad(
                path,
                f"{path.name} is of a model that was trained with {'pipeline' if several[0] == 'pp_01' else 'tensor'} "
                f"parallelism ({outer.name}/{several[0]} is there)",
                "unsupported-parallelism",
                "load it with fairseq2 and save it with one process",
            )
    shards = {int(found[1]): one for one in inside.iterdir() if (found := _SHARD.fullmatch(one.name))}
    missing = [f"sdp_{rank:02}.pt" for rank in range(max(shards, default=-1)) if rank not in shards]
    if missing:
        raise _bad(path, f"{path.name}: {', '.join(missing)} missing among its {len(shards)} shards", "shard")
    if shards:
        return Run(path, tuple(shards[rank] for rank in sorted(shards)), folders)
    return Run(path, ((inside / "model.pt") if (inside / "model.pt").is_file() else folder,), folders)


def _upwards(folder: Path) -> Iterator[Path]:
    """List a folder and those around it that belong to the same run."""
    yield folder
    while _INSIDE.fullmatch(folder.name):
        folder = folder.parent
        yield folder


# --- tensors --------------------------------------------------------------------------------------------------------


def family_of(names: Iterable[str], name: str) -> str:
    """Name fairseq2's family of a model.

    Args:
        names: its keys.
        name: the checkpoint's name, for errors.

    Raises:
        CheckpointError: `unsupported-model`: one that is not converted, named.
    """
    keys = set(names)
    other = next((what for start, what in _OTHERS.items() if any(key.startswith(start) for key in keys)), None)
    if other is not None:
        raise CheckpointError(
            f"{name} is {other} of fairseq2's, which is not supported; nothing was written",
            code="unsupported-model",
            key=name,
            hint="wav2vec 2.0 models of fairseq2 are: pretrained, or with a CTC head",
        )
    return PRETRAINED if "quantizer.entries" in keys else ASR


def join(
    parts: Sequence[tuple[Container, Mapping[str, StoredTensor]]], name: str
) -> tuple[Container, dict[str, StoredTensor]]:
    """Join the shards of a model: each file has every tensor's rows from where the last one's end.

    Args:
        parts: each file with its tensors, in the order of their ranks.
        name: the checkpoint's name, for errors.

    Raises:
        CheckpointError: `shard`: rows are missing, or too many.
    """
    container, first = parts[0]
    _check_rows(parts, name)
    if len(parts) == 1:
        return container, dict(first)
    storages = {
        f"{rank}/{key}": replace(where, file=rank)
        for rank, (one, _) in enumerate(parts)
        for key, where in one.storages.items()
    }
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in first.items():
        found = [
            (rank, one[key])
            for rank, (_, one) in enumerate(parts)
            if key in one and (rank == 0 or 0 not in one[key].shape)
        ]
        found = found if tensor.shape else found[:1]  # a number has no rows: every rank has the same
        if 0 in tensor.shape and len(found) > 1:
            found = found[1:]
        pieces = tuple(
            replace(one, storage=replace(one.storage, key=f"{rank}/{one.storage.key}")) for rank, one in found
        )
        tensors[key] = pieces[0] if len(pieces) == 1 else _joined(key, pieces, name)
    others = tuple(one for one, _ in parts[1:])
    return replace(
        container, storages=storages, others=others, globals=frozenset().union(*(one.globals for one, _ in parts))
    ), tensors


def _joined(key: str, pieces: tuple[StoredTensor, ...], name: str) -> JoinedTensor:
    tails = {(piece.storage.type, piece.shape[1:]) for piece in pieces}
    if len(tails) > 1:
        raise CheckpointError(f"{name}: its shards do not agree on {key}", code="shard", key=key)
    shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
    if not all(piece.is_contiguous for piece in pieces):
        raise CheckpointError(f"{name}: {key} does not lie row after row in its shards", code="shard", key=key)
    stride = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
    return JoinedTensor(Storage("", pieces[0].storage.type, math.prod(shape)), 0, shape, stride, pieces)


def _check_rows(parts: Sequence[tuple[Container, Mapping[str, StoredTensor]]], name: str) -> None:
    """Compare the rows of one square matrix with its columns: what is missing shows, and what is too many."""
    found = [(one[_SQUARE].shape if _SQUARE in one else ()) for _, one in parts]
    if len(found[0]) != 2 or not found[0][0]:
        return
    (each, whole), files = found[0], [one.path.name for one, _ in parts]
    start = 0
    for shape, file in zip(found, files, strict=True):
        rows, meant = shape[0] if shape else 0, max(0, min(each, whole - start))
        if rows != meant or (start >= whole and len(files) > -(-whole // each)):
            detail = f"{rows} rows of {_SQUARE} in {file}, {meant} were expected"
            raise _shards(name, f"{detail}: the files are not the shards of one model")
        start += rows
    if start < whole:
        missing = [f"sdp_{rank:02}.pt" for rank in range(len(files), -(-whole // each))]
        held = f"{files[0]} is one shard of {-(-whole // each)}" if len(files) == 1 else f"{len(files)} shards"
        raise _shards(name, f"{held}: rows {start} to {whole - 1} of {whole} are missing ({', '.join(missing)})")


def _shards(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {what}; nothing was written",
        code="shard",
        key=name,
        hint="name the folder that holds every sdp_RR.pt of the step, as the training wrote it",
    )


# --- settings -------------------------------------------------------------------------------------------------------


def read_settings(run: Run, family: str, options: Options) -> tuple[dict[str, Any], Path | None]:
    """Read what belongs to a checkpoint, in the sections that fairseq's settings have.

    Args:
        run: where it is.
        family: fairseq2's name of its family.
        options: what the user asked for.

    Returns:
        `model` with every field of fairseq2's configuration, those of the encoder among them; `task` with `normalize` where
        it is known, and where everything came from; an empty `criterion`. And the file that `model` is from, if any.

    Raises:
        CheckpointError: `no-settings`, when there are none; `bad-settings`.
    """
    fields, origin, architecture, file = _fields(run, family, options)
    task: dict[str, Any] = {"_name": "fairseq2", "sample_rate": 16000, "settings_from": origin}
    normalize, said = _normalize(run, family, architecture, options)
    if normalize is not None:
        task |= {"normalize": normalize, "normalize_from": said}
    return {"model": {"_name": f"fairseq2.{family}"} | fields, "task": task, "criterion": {}}, file


def _fields(run: Run, family: str, options: Options) -> tuple[dict[str, Any], str, str, Path | None]:
    """The fields, where they are from, the architecture's name where one was named, and the file where there is one."""
    card, file = None, options.card
    if file is None and not options.architecture:
        file = next((one for folder in run.folders if (one := folder / "model.yaml").is_file()), None)
        file = file or next(iter(_cards(run)), None)
    if file is not None:
        card = _card(file, family, run)
    if card is None and not options.architecture:
        raise CheckpointError(
            f"{run.path.name} holds tensors without settings, and no model.yaml lies beside it: heads and strides are unknown; "
            "nothing was written",
            code="no-settings",
            key=run.path.name,
            hint="name its model.yaml or asset card with --base FILE, or its architecture with --arch NAME, such as "
            + ("300m" if family == ASR else "large_lv60k"),
        )
    architecture = options.architecture or (card or {}).get("model_arch") or ""
    fields: dict[str, Any] = {}
    if architecture:
        fields = dict(
            _architecture(architecture, family, "--arch" if options.architecture else file.name if file else "")
        )
    stated = _configuration((card or {}).get("model_config"), file)
    origin = " over ".join(
        ([file.name] if file and stated else []) + ([f"architecture {architecture}"] if architecture else [])
    )
    return fields | stated, origin or (file.name if file else ""), str(architecture), file


def _cards(run: Run) -> Iterator[Path]:
    """The asset cards beside a file: YAML files that name a family of models."""
    for file in sorted(run.folders[0].glob("*.y*ml")) if run.files == (run.path,) else ():
        if file.name != "config.yaml" and any("model_family" in one for one in _documents(file)):
            yield file


def _documents(file: Path) -> list[dict[str, Any]]:
    found = read_yaml(file, lambda what: _bad(file, f"{file.name} {what}", "bad-settings"))
    return [one for one in found if isinstance(one, dict)]


def _card(file: Path, family: str, run: Run) -> dict[str, Any]:
    """Choose the card of a checkpoint in a file of cards, with what it takes from the cards that it is based on."""
    known = {str(one.get("name")).partition("@")[0]: one for one in _documents(file)}
    whole = {name: _based(name, known) for name in known}
    fitting = {name: card for name, card in whole.items() if card.get("model_family") == family}
    if len(fitting) > 1:
        mine = {name: card for name, card in fitting.items() if _last(card.get("checkpoint")) == run.path.name}
        fitting = mine or fitting
    if len(fitting) != 1:
        others = sorted({str(card.get("model_family")) for card in whole.values() if card.get("model_family")})
        what = f"names {len(fitting)} models of {family}: {', '.join(sorted(fitting))[:200]}"
        what = (
            what
            if fitting
            else f"names no model of {family}" + (f", but of {', '.join(others)[:200]}" if others else "")
        )
        raise _bad(file, f"{file.name} {what}", "bad-settings", "leave the card of this checkpoint alone in the file")
    return next(iter(fitting.values()))


def _based(name: str, known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    seen: set[str] = set()
    while name in known and name not in seen:
        seen.add(name)
        made = known[name] | made
        name = str(known[name].get("base")).partition("@")[0]
    return made


def _architecture(name: Any, family: str, key: str) -> Mapping[str, Any]:
    found = ARCHITECTURES[family].get(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(
            f"{str(name)[:60]!r} is not an architecture of {family}; nothing was written",
            code="unknown-architecture",
            key=key,
            hint=f"known: {', '.join(ARCHITECTURES[family])}; or name the model.yaml of the run with --base FILE",
        )
    return found


def _configuration(value: Any, file: Path | None) -> dict[str, Any]:
    """Give a `model_config` of any version the fields of today's, those of the encoder beside the others."""
    value = value if value is not None else {}
    if isinstance(value, dict) and isinstance(value.get("_set_"), dict):
        value = value["_set_"] | {key: one for key, one in value.items() if key != "_set_"}
    inner = value.get("encoder_config", {}) if isinstance(value, dict) else None
    if isinstance(inner, dict) and isinstance(inner.get("_set_"), dict):
        inner = inner["_set_"] | {key: one for key, one in inner.items() if key != "_set_"}
    if not isinstance(value, dict) or not isinstance(inner, dict):
        name = file.name if file else "model.yaml"
        raise CheckpointError(f"{name}: its model_config is not a mapping", code="bad-settings", key=name)
    fields = {key: one for key, one in (value | inner).items() if key not in ("encoder_config", "vocab_info")}
    if isinstance(value.get("vocab_info"), dict):  # 0.4
        fields.setdefault("target_vocab_size", value["vocab_info"].get("size"))
    return {_RENAMED.get(key, key): one for key, one in fields.items()}


def _normalize(run: Run, family: str, architecture: str, options: Options) -> tuple[bool | None, str]:
    if options.normalize is not None:
        return options.normalize, "--normalize" if options.normalize else "--no-normalize"
    for folder in run.folders:
        file = folder / "config.yaml"
        for document in _documents(file) if file.is_file() else ():
            for path in (("dataset", "asr_task_config"), ("dataset", "ssl_task_config"), ("dataset",)):
                inside: Any = document
                for key in path:
                    inside = inside.get(key) if isinstance(inside, dict) else None
                if isinstance(inside, dict) and isinstance(inside.get("normalize_audio"), bool):
                    return inside["normalize_audio"], f"config.yaml: {'.'.join(path)}.normalize_audio"
    if architecture in NORMALISED[family]:
        return True, f"architecture {architecture}: omnilingual-asr always normalises"
    return None, ""


# --- the tokenizer --------------------------------------------------------------------------------------------------


def find_tokenizer(run: Run, options: Options) -> Path | None:
    """Find the sentencepiece model of a checkpoint: the one that was named, or the only one beside it.

    Raises:
        CheckpointError: `several-tokenizers`.
    """
    if options.tokenizer is not None:
        return options.tokenizer
    for folder in run.folders:
        found = sorted(folder.glob("*.model"))
        if len(found) > 1:
            listed = ", ".join(one.name for one in found)[:200]
            raise _bad(found[0], f"{folder.name} holds several tokenizers: {listed}", "several-tokenizers", _DICT)
        if found:
            return found[0]
    return None


def read_tokenizer(path: Path) -> tuple[Dictionary, dict[str, Any], bytes]:
    """Read a tokenizer: its pieces, and what decides how they become text.

    Args:
        path: the `.model` file.

    Returns:
        A dictionary of the pieces, settings as plain data, and the file as it is.

    Raises:
        CheckpointError: `bad-dictionary`: it is not a sentencepiece model.
    """
    data = read_beside(
        path, "sentencepiece model", lambda what: _bad(path, f"{path.name} {what}", "bad-dictionary", _DICT)
    )
    model = read_model(data)
    return of_pieces(model, path), _decoding(path, model, data), data


_DICT = "name the tokenizer's .model with --dict FILE"


def _decoding(path: Path, model: SentencePieceModel, data: bytes) -> dict[str, Any]:
    return {
        "name": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "kinds": {str(index): kind for index, kind in enumerate(model.kinds) if kind != NORMAL},
        "ids": dict(model.ids),
        "unk_surface": model.unk_surface,
        "dummy_prefix": model.dummy_prefix,
        "extra_whitespace": model.extra_whitespace,
    }


def _last(path: Any) -> str:
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2]


def _bad(path: Path, what: str, code: str, hint: str = "") -> CheckpointError:
    return CheckpointError(f"{what}; nothing was written", code=code, key=path.name, hint=hint)
