"""Makes a recording: fairseq's answers to the probe inputs, with what is needed to use them elsewhere."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.families import Request
from convert.loading import quiet
from convert.verification.devices import steady
from convert.verification.fairseq_side import recording
from convert.verification.inputs import Waveform, collect, in_languages, probes
from convert.verification.recording import Recorded, ask, pack
from convert.verification.reference import answering, run_interpreter
from convert.verification.run import pieces_of
from convert.verification.subject import read_subject


def make_recording(
    opened: Checkpoint,
    out: Path,
    request: Request,
    *,
    fairseq_python: str | None,
    audio: Sequence[str | Path],
    dtype: str,
    long: bool,
) -> Path:
    """Run fairseq and write its answers.

    Args:
        opened: the checkpoint.
        request: what a conversion would be asked for.
        out, fairseq_python, audio, dtype, long: as for `convert.verification.record`.
    """
    with tempfile.TemporaryDirectory(prefix="fairseq-to-hf-") as folder:
        made = Path(folder) / "answers"
        with opened.unchanged():
            clips = _answer(opened, request, made, fairseq_python, audio, dtype, long)
        return _finish(made, out, clips)


def _answer(
    opened: Checkpoint,
    request: Request,
    made: Path,
    python: str | None,
    audio: Sequence[str | Path],
    dtype: str,
    long: bool,
) -> Mapping[str, Waveform]:
    subject, geometry = read_subject(opened, request)
    clips = collect(audio, subject.rate, geometry)
    wanted = [one for one in probes(geometry, clips, rate=subject.rate) if long or one.name != "30-seconds"]
    if not request.language:
        wanted = in_languages(wanted, (name for name in subject.languages if name != subject.language))
    pieces = list(pieces_of(geometry, clips, wanted).values())
    asked, arrays = ask(subject, clips, wanted, pieces, dtype)
    if python is not None:
        with run_interpreter(python, asked, arrays) as answers:
            shutil.copyfile(answers, made)
    else:
        with answering(), quiet(), steady():
            recording.record(asked | {"out": str(made)}, arrays)
    return clips


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
