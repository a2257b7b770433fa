"""Where a checkpoint of fairseq2 is: a run's folder, one step, its shards, or one file; and its tensors, joined from all shards."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convert.checkpoint.container import Container
from convert.checkpoint.fairseq2_architectures import ASR, PRETRAINED
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
        raise unusable(path, f"{path.parent.name} holds no step_N to choose from", "no-checkpoint")
    return _files(folder)


def _step(folder: Path, steps: Mapping[int, Path], named: str | None) -> int:
    scores = {number: score for number in steps if (score := _score(folder, number)) is not None}
    if named == "last" or (named is None and len(steps) == 1):
        return max(steps)
    if named == "best" and scores:
        return max((score, number) for number, score in scores.items())[1]
    listed = ", ".join(f"step_{n}" + (f" (score {scores[n]:g})" if n in scores else "") for n in sorted(steps))
    if named == "best":
        raise unusable(
            folder, f"{folder.name} holds no scores, so that none of its steps is the best: {listed}", "no-score"
        )
    raise unusable(
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
                raise unusable(file, f"{file.name} does not hold a score", "bad-score") from None
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
            raise unusable(
                path,
                f"{path.name} is of a model that was trained with {'pipeline' if several[0] == 'pp_01' else 'tensor'} "
                f"parallelism ({outer.name}/{several[0]} is there)",
                "unsupported-parallelism",
                "load it with fairseq2 and save it with one process",
            )
    shards = {int(found[1]): one for one in inside.iterdir() if (found := _SHARD.fullmatch(one.name))}
    missing = [f"sdp_{rank:02}.pt" for rank in range(max(shards, default=-1)) if rank not in shards]
    if missing:
        raise unusable(path, f"{path.name}: {', '.join(missing)} missing among its {len(shards)} shards", "shard")
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


def unusable(path: Path, what: str, code: str, hint: str = "") -> CheckpointError:
    """Make the error for a file of a run that cannot be used."""
    return CheckpointError(f"{what}; nothing was written", code=code, key=path.name, hint=hint)
