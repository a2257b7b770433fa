"""From a checkpoint to a model directory: planned, written beside the target, read back, then renamed into place."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.conversion import DTYPES as DTYPES
from convert.conversion import record_of
from convert.directory import ModelDirectory
from convert.errors import ConvertError, MismatchError, Problem
from convert.families import Conversion, Request, describe
from convert.families.base import Sidecar
from convert.families.tokenizers import SUBWORDS
from convert.files import check_directory, create, new_directory, sha256_of
from convert.pieces import Piece, pieces, split
from convert.report import VERSION, Progress, counted, json_pieces
from convert.request import Options, request_again
from convert.sources import open_source
from convert.transfer import Transfer, Written
from convert.workspace import in_the_way, sweep

MAX_SHARD_SIZE = 5_000_000_000  # what transformers' save_pretrained splits at
CARD = "README.md"
_RECORDS = {"conversion.json", "verification.json", "evaluation.json"}
_USUAL = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"}
_USUAL |= {SUBWORDS, "tokenizer_config.json", "vocab.json"}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]?)B?")
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # of the files that are taken for checkpoints in a folder


@dataclass(frozen=True, slots=True)
class Converted:
    """A finished conversion.

    Args:
        path: the model directory.
        model: what was decided about it.
        files: size and SHA-256 of every file.
        source_sha256: SHA-256 of the checkpoint.
        based: whether settings were taken from the checkpoint that was passed as `base`.
    """

    path: Path
    model: Conversion
    files: dict[str, dict[str, Any]]
    source_sha256: str
    based: bool = False


def plan(
    checkpoint: str | Path,
    *,
    head: str | None = None,
    dictionary: str | Path | None = None,
    base: str | Path | None = None,
    training_only: Sequence[str] = (),
    keep_final_proj: bool = False,
    language: str | None = None,
    data_config: str | Path | None = None,
    post_process: str | None = None,
    ema: bool = False,
    arch: str = "",
    normalize: bool | None = None,
) -> Conversion:
    """Decide what a conversion of a checkpoint would do. Reads no tensor bytes, but of buffers that must repeat each other.

    Args:
        checkpoint: a path, a name of the catalogue, an address, or a file on the Hub; see `convert.sources.open_source`.
        head: `encoder` for the model without its head; by default what the checkpoint is.
        dictionary: a `dict.*.txt`, for checkpoints that carry none, or the tokenizer's `.model`.
        base: the pretrained checkpoint, for one that does not carry its settings, or not those that it was fine-tuned from.
        training_only: settings unknown to this version that act while training only.
        keep_final_proj: keep the pretraining head of a model whose class has no place for it, in `final_proj.safetensors`.
        language: the one language to take of an MMS checkpoint that has adapters for several, or to translate into.
        data_config: the config.yaml of a speech-to-text task; its dictionary and its sentencepiece model lie beside it.
        post_process: fairseq's name of how text is made of the symbols, such as `sentencepiece`, in place of the recipe's.
        ema: take the exponential moving average of the weights that the checkpoint holds beside them.
        arch: the registered name of the architecture, for a checkpoint that lies without its model.yaml.
        normalize: whether waveforms were normalised, where the settings do not say it.

    Raises:
        CheckpointError: the file cannot be read.
        PlanError: it cannot be converted completely; every reason is in `problems`.
    """
    options = Options(
        head=head,
        dictionary=dictionary,
        base=base,
        training_only=training_only,
        keep_final_proj=keep_final_proj,
        language=language,
        data_config=data_config,
        post_process=post_process,
        ema=ema,
        arch=arch,
        normalize=normalize,
    )
    with options.opened(checkpoint) as (opened, request):
        return describe(opened, request)


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    head: str | None = None,
    dictionary: str | Path | None = None,
    base: str | Path | None = None,
    training_only: Sequence[str] = (),
    keep_final_proj: bool = False,
    language: str | None = None,
    data_config: str | Path | None = None,
    post_process: str | None = None,
    ema: bool = False,
    arch: str = "",
    normalize: bool | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    allow_non_finite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Turn a fairseq checkpoint into a Hugging Face model directory, completely or not at all.

    Args:
        checkpoint: a path, a name of the catalogue, an address, or a file on the Hub; see `convert.sources.open_source`.
        out: the directory to make.
        head, dictionary, base, training_only, keep_final_proj, language, data_config, post_process, ema, arch, normalize: as for `plan`.
        dtype: `keep`, `float32`, `float16` or `bfloat16`.
        max_shard_size: the largest safetensors file: a number of bytes, or a text such as `5GB`, in powers of 1000.
        overwrite: whether an existing model directory is replaced, once the new one is proved.
        allow_non_finite: whether NaN and infinite weights are taken as they are.
        progress: called with (bytes done, bytes in all), from several threads.

    Returns:
        What was written; every tensor was read back and compared byte for byte with the checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is damaged.
        PlanError: it cannot be converted completely; every reason is in `problems`.
        ConvertError: `exists`, when `out` is there already.
        OSError: the disk is full, and the like.

    Example:
        >>> import tempfile
        >>> done = convert("checkpoints/espeak-wav2vec2-ctc.pt", tempfile.mkdtemp() + "/model")
        >>> done.model.target
        'Wav2Vec2ForCTC'
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ConvertError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}", code="usage", key="--dtype")
    shard_size = _bytes(max_shard_size)
    replaceable = functools.partial(_replaceable, checkpoint=Path(checkpoint)) if overwrite else None
    check_directory(out, replaceable)
    options = Options(
        head=head,
        dictionary=dictionary,
        base=base,
        training_only=training_only,
        keep_final_proj=keep_final_proj,
        language=language,
        data_config=data_config,
        post_process=post_process,
        ema=ema,
        arch=arch,
        normalize=normalize,
    )
    with options.opened(checkpoint) as (opened, request):
        model = describe(opened, request)
        with new_directory(out, replaceable) as work:
            files, digest = _write(opened, model, request, work, DTYPES[dtype], shard_size, allow_non_finite, progress)
            opened.container.check_unchanged()
    return Converted(out, model, files, digest, opened.base is not None)


def convert_all(folder: str | Path, out: str | Path, **options: Any) -> dict[Path, Converted | ConvertError]:
    """Convert every checkpoint in a folder, each into a directory of its own.

    Args:
        folder: the folder; what is in folders inside it is left alone.
        out: the directory to make them in, each by the checkpoint's name; it may be there already.
        options: as for `convert`.

    Returns:
        What was made of each checkpoint, or why it was refused.

    Raises:
        ConvertError: `no-checkpoint`, when the folder is none, or holds none.
    """
    folder, out = Path(folder), Path(out)
    files = [file for file in sorted(folder.glob("*")) if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        what = "holds no checkpoint" if folder.is_dir() else "is not a folder"
        hint = f"a checkpoint's name ends in {', '.join(SUFFIXES)}"
        raise ConvertError(f"{folder} {what}; nothing was written", code="no-checkpoint", key=str(folder), hint=hint)
    out.mkdir(exist_ok=True)
    done: dict[Path, Converted | ConvertError] = {}
    for file in files:
        alone = [other.stem for other in files].count(file.stem) == 1
        try:
            done[file] = convert(file, out / (file.stem if alone else file.name), **options)
        except ConvertError as error:
            done[file] = error
    return done


def _bytes(text: int | str) -> int:
    found = _SIZE.fullmatch(str(text).strip().upper())
    count = round(float(found[1]) * 1000 ** " KMGT".index(found[2] or " ")) if found else 0
    if count < 1:
        hint = "give a number of bytes, or of KB, MB, GB or TB, such as 5GB"
        raise ConvertError(f"--max-shard-size: {text} is not a size", code="usage", key="--max-shard-size", hint=hint)
    return count


def _write(
    opened: Checkpoint,
    model: Conversion,
    request: Request,
    work: Path,
    dtype: str,
    max_shard_size: int,
    allow_non_finite: bool,
    progress: Progress | None,
) -> tuple[dict[str, dict[str, Any]], str]:
    listed = pieces(opened.container, model.plan, opened.over(model.group), dtype)

    def beside(sidecar: Sidecar) -> list[Piece]:
        return pieces(opened.container, sidecar.plan, opened.tensors_of(sidecar.group), dtype)

    total = opened.size + sum(piece.count for some in (listed, *map(beside, model.sidecars)) for piece in some)
    shards = split(listed, max_shard_size)
    written: list[Written] = []
    with Transfer(opened.container, allow_non_finite=allow_non_finite, progress=counted(progress, total)) as transfer:
        for index, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{index:05}-of-{len(shards):05}.safetensors"
            written.append(transfer.write(work / name, shard))
        sidecars = [transfer.write(work / sidecar.file, beside(sidecar)) for sidecar in model.sidecars]
        digest = transfer.source_sha256()
    if len(shards) > 1:
        names = {piece.spec.name: file.name for shard, file in zip(shards, written, strict=True) for piece in shard}
        size = sum(piece.count for piece in listed)
        written.append(
            _file(work, "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": names})
        )
    names_of_dtypes = {value: key for key, value in DTYPES.items()}
    config = model.configuration
    if dtype != "keep":
        config["torch_dtype"] = names_of_dtypes[dtype]
    written.append(_file(work, "config.json", config))
    written += [_file(work, name, content) for name, content in sorted(model.processor.files.items())]
    written += sidecars
    files = {
        file.name: {"size": file.size, "sha256": file.sha256} for file in sorted(written, key=lambda file: file.name)
    }
    named = names_of_dtypes.get(dtype, "keep")
    _file(work, "conversion.json", record_of(opened, model, request, digest, named, files, VERSION))
    return files, digest


def compare_weights(
    checkpoint: str | Path,
    model_dir: str | Path,
    *,
    dictionary: str | Path | None = None,
    base: str | Path | None = None,
) -> list[Problem]:
    """Compare every tensor of a model directory with the checkpoint it claims to come from, byte for byte.

    Args:
        checkpoint: the fairseq checkpoint.
        model_dir: the model directory; its `conversion.json` says what was asked for.
        dictionary, base: as for `plan`.

    Returns:
        One problem for each tensor that is missing, unexpected, of another shape or dtype, or of other bytes; empty when
        all are the same.

    Raises:
        CheckpointError, PlanError: the checkpoint cannot be read or converted.
        ConvertError: `not-a-model`, when the directory holds no conversion of ours.
    """
    directory = ModelDirectory(Path(model_dir))
    with open_source(checkpoint, base=base, dictionary=dictionary, **directory.record.asked.opening) as opened:
        return compare_opened(opened, directory, dictionary=dictionary)


def compare_opened(
    opened: Checkpoint, directory: ModelDirectory, *, dictionary: str | Path | None = None
) -> list[Problem]:
    """Compare every tensor of a model directory with an opened checkpoint, as `compare_weights` does."""
    dtype = DTYPES[directory.record.dtype]
    asked = request_again(directory, opened, dictionary=dictionary)
    model = describe(opened, asked)
    problems = directory.compare(opened, pieces(opened.container, model.plan, opened.over(model.group), dtype))
    for sidecar in model.sidecars:
        listed = pieces(opened.container, sidecar.plan, opened.tensors_of(sidecar.group), dtype)
        problems += directory.compare(opened, listed, sidecar.file)
    return problems


def _file(work: Path, name: str, content: Any) -> Written:
    """Write a small file, JSON unless its content is bytes already, and read it back."""
    digest, size = hashlib.sha256(), 0
    with create(work / name) as file:
        for piece in [content] if isinstance(content, bytes) else json_pieces(content):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    if sha256_of(work / name) != digest.hexdigest():
        raise MismatchError(f"{name} read back differently from what was written", code="read-back", key=name)
    return Written(name, size, digest.hexdigest())


def _replaceable(out: Path, checkpoint: Path) -> set[str]:
    """Name the files that go with a model directory when it is replaced: those that this tool wrote, but no card.

    Raises:
        ConvertError: `not-ours`, status 2: it is another directory, or holds files of others.
    """
    sweep(out)
    if not (out / "conversion.json").is_file():
        raise in_the_way(out, "is not a model directory of this tool", "choose another name, or remove it", "not-ours")
    if out.resolve() in checkpoint.resolve().parents:
        raise in_the_way(out, "holds the checkpoint itself", "move the checkpoint", "not-ours")
    written = _written(out)
    foreign = sorted({file.name for file in out.iterdir()} - written - {CARD})
    if foreign:
        raise ConvertError(
            f"{out} holds files that this tool did not write, and --overwrite would remove: {', '.join(foreign[:5])}",
            code="not-ours",
            key=str(out / foreign[0]),
            hint="move them elsewhere, or choose another name",
        )
    return written


def _written(out: Path) -> set[str]:
    try:
        return {*ModelDirectory(out).record.files, *_RECORDS}
    except ConvertError:  # damaged, and so one more reason to replace it; what it was made of is not known any more
        return {*_USUAL, *_RECORDS, *(file.name for file in out.glob("*.safetensors*"))}
