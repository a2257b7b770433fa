"""Prove that a converted model is the same model: fairseq's own code against transformers, on the same waveforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import ConvertError, MismatchError, needing
from convert.files import check_file
from convert.sources import locate

if TYPE_CHECKING:
    from convert.verification.report import Curve, Verification

__all__ = ["Curve", "Verification", "assert_identical", "record", "verify"]


def __getattr__(name: str) -> Any:
    if name in ("Curve", "Verification"):  # their module imports torch, which pytest's plugin must not
        from convert.verification import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@needing("verify")
def verify(
    checkpoint: str | Path,
    model_dir: str | Path,
    *,
    reference: str | Path | None = None,
    fairseq_python: str | None = None,
    devices: Sequence[str] = (),
    audio: Sequence[str | Path] = (),
    require: str | None = None,
    dictionary: str | Path | None = None,
    base: str | Path | None = None,
    long: bool = True,
    languages: Sequence[str] = (),
    write: bool = True,
    progress: Callable[[int, int], None] | None = None,
    doing: Callable[[str], None] | None = None,
) -> Verification:
    """Prove that a model directory is the checkpoint's model: same bytes, same files, same outputs as fairseq's own code.

    Args:
        checkpoint: the fairseq checkpoint.
        model_dir: the directory that `convert` made of it.
        reference: a recording of `record`, where fairseq is not installed.
        fairseq_python: another interpreter, with torch and fairseq.
        devices: `cpu`, `cuda`, `cuda:N`; by default the CPU and every CUDA device.
        audio: recordings to run beside the bundled clip: wav or flac files, or folders of them.
        require: `identical` or `rounding`, for every input; by default `identical` for single utterances on the CPU, where
            both sides have the same weights and do the same arithmetic, and `rounding` elsewhere.
        dictionary, base: as for `convert`.
        long: whether 30 seconds of speech are among the inputs.
        languages: of a model with several, those to run beside that of its weights; by default all. The bytes of
            all are compared.
        write: whether `verification.json` is written into the directory.
        progress: called with (steps done, steps in all that are known of so far).
        doing: called with what is done next.

    Returns:
        What was found; `passed` says whether the model was proved to be the same.

    Raises:
        ConvertError: with status 2 where there is no answer: no fairseq, no such device, an unreadable file, a recording of
            another checkpoint; with status 1 where the directory was made from another checkpoint.

    Example:
        >>> verify("checkpoint_best.pt", "my-model").passed  # doctest: +SKIP
        True
    """
    from convert.verification.run import Options
    from convert.verification.run import verify as run

    options = Options(
        reference=_path(reference),
        fairseq_python=fairseq_python,
        devices=tuple(devices),
        audio=tuple(audio),
        require=require,
        dictionary=None if dictionary is None else locate(dictionary)[0],
        base=base,
        long=long,
        languages=tuple(languages),
        write=write,
        progress=progress,
        doing=doing,
    )
    return run(checkpoint, Path(model_dir), options)


def assert_identical(
    checkpoint: str | Path,
    model_dir: str | Path,
    *,
    reference: str | Path | None = None,
    write: bool = False,
    **options: Any,
) -> Verification:
    """Raise, with numbers, unless a model directory is the checkpoint's model.

    Args:
        checkpoint: the fairseq checkpoint.
        model_dir: the directory that `convert` made of it.
        reference: a recording of `record`, where fairseq is not installed.
        write: whether `verification.json` is written.
        options: as for `verify`.

    Returns:
        What was found.

    Raises:
        MismatchError: an `AssertionError` too: every problem, with the greatest difference, where it is, and the allowance.
        ConvertError: as `verify`.

    Example:
        >>> assert_identical("checkpoint_best.pt", "my-model", reference="reference.safetensors")  # doctest: +SKIP
    """
    done = verify(checkpoint, model_dir, reference=reference, write=write, **options)
    if not done.passed:
        lines = "\n".join(f"  {problem.code}: {problem}" for problem in done.problems)
        raise MismatchError(
            f"{Path(model_dir).name} is not {Path(checkpoint).name}, or was not proved to be:\n{lines}",
            code="different",
            key=Path(model_dir).name,
            problems=done.problems,
        )
    return done


@needing("record")
def record(
    checkpoint: str | Path,
    out: str | Path,
    *,
    audio: Sequence[str | Path] = (),
    fairseq_python: str | None = None,
    dtype: str | None = None,
    head: str | None = None,
    dictionary: str | Path | None = None,
    base: str | Path | None = None,
    training_only: Sequence[str] = (),
    ema: bool = False,
    arch: str = "",
    normalize: bool | None = None,
    long: bool = True,
    language: str | None = None,
    data_config: str | Path | None = None,
    post_process: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    doing: Callable[[str], None] | None = None,
) -> Path:
    """Run fairseq once and keep its answers, to verify later where fairseq is not installed.

    Args:
        checkpoint: the fairseq checkpoint.
        out: the safetensors file to write.
        audio: recordings to run beside the bundled clip.
        fairseq_python: another interpreter, with torch and fairseq; by default this one.
        dtype: `float16` or `bfloat16`, to answer for weights rounded to it too.
        head, dictionary, base, training_only, ema, arch, normalize, data_config, post_process: as for `convert`, which
            refuses the same checkpoints.
        long: whether 30 seconds of speech are among the inputs.
        language: as for `convert`; by default all languages are among the answers.
        overwrite: whether an existing file is replaced, once the new one is made.
        progress, doing: as for `verify`.

    Returns:
        The file.

    Raises:
        ConvertError: as `verify`; `exists`, when `out` is there already.

    Example:
        >>> record("checkpoint_best.pt", "reference.safetensors")  # doctest: +SKIP
    """
    from convert import request
    from convert.verification.make import Options, make_recording
    from convert.verification.subject import HALVES

    check_file(Path(out), overwrite)
    if dtype and dtype not in HALVES:
        raise ConvertError(f"{dtype!r} is neither float16 nor bfloat16", code="usage", key="--dtype")
    conversion = request.Options(
        head=head,
        dictionary=dictionary,
        base=base,
        training_only=training_only,
        language=language,
        data_config=data_config,
        post_process=post_process,
        ema=ema,
        arch=arch,
        normalize=normalize,
    )
    options = Options(
        audio=tuple(audio),
        fairseq_python=fairseq_python,
        dtype=dtype or "",
        long=long,
        overwrite=overwrite,
        progress=progress,
        doing=doing,
    )
    with conversion.opened(checkpoint) as (opened, asked):
        return make_recording(opened, Path(out), asked, options)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
