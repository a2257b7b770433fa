"""Makes a recording: fairseq's answers to the probe inputs, with what is needed to use them elsewhere."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from convert.errors import ConvertError, check_place
from convert.loading import quiet
from convert.verification.devices import steady
from convert.verification.fairseq_side import recording
from convert.verification.fairseq_side.importing import CannotBuildError
from convert.verification.inputs import Waveform, collect, in_languages, probes
from convert.verification.recording import Recorded, ask, pack
from convert.verification.reference import HINT, run_interpreter
from convert.verification.run import pieces_of
from convert.verification.subject import HALVES, read_subject


def make_recording(
    checkpoint: str | Path,
    out: Path,
    *,
    fairseq_python: str | None,
    audio: Sequence[str | Path],
    dtype: str,
    dictionary: Path | None,
    base: str | Path | None,
    ema: bool,
    trusted: bool,
    long: bool,
    language: str,
    overwrite: bool,
) -> Path:
    """Run fairseq and write its answers; the arguments are those of `convert.verification.record`."""
    check_place(out, overwrite)
    if dtype and dtype not in HALVES:
        raise ConvertError(f"{dtype!r} is neither float16 nor bfloat16", code="usage", key="--dtype")
    subject, geometry = read_subject(
        checkpoint, dictionary=dictionary, base=base, ema=ema, trusted=trusted, language=language
    )
    clips = collect(audio, subject.rate, geometry)
    wanted = [one for one in probes(geometry, clips, rate=subject.rate) if long or one.name != "30-seconds"]
    if not language:
        wanted = in_languages(wanted, (name for name in subject.languages if name != subject.language))
    pieces = list(pieces_of(geometry, clips, wanted).values())
    request, arrays = ask(subject, clips, wanted, pieces, dtype)
    if fairseq_python is not None:
        with run_interpreter(fairseq_python, request, arrays) as made:
            return _finish(made, out, clips)
    with tempfile.TemporaryDirectory(prefix="fairseq-to-hf-") as folder:
        made = Path(folder) / "answers"
        try:
            with quiet(), steady():
                recording.record(request | {"out": str(made)}, arrays)
        except CannotBuildError as error:
            raise ConvertError(f"{error}", code="no-fairseq", hint=HINT) from error
        return _finish(made, out, clips)


def _finish(made: Path, out: Path, clips: Mapping[str, Waveform]) -> Path:
    pack(made, clips)
    Recorded(made)  # what was written can be read
    beside = out.with_name(f".{out.name}.part")
    try:
        shutil.copyfile(made, beside)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return out
