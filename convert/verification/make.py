"""Makes a recording: fairseq's answers to the probe inputs, with what is needed to use them elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.families import Request
from convert.files import new_file, scratch_directory
from convert.loading import quiet
from convert.verification.devices import steady
from convert.verification.fairseq_side import recording
from convert.verification.inputs import collect, in_languages, probes
from convert.verification.recording import Recorded, ask, pack
from convert.verification.reference import answering, run_interpreter
from convert.verification.run import Doing, Progress, Steps, pieces_of
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
    overwrite: bool,
    progress: Progress | None,
    doing: Doing | None,
) -> Path:
    """Run fairseq and write its answers.

    Args:
        opened: the checkpoint.
        request: what a conversion would be asked for.
        out, fairseq_python, audio, dtype, long, overwrite, progress, doing: as for `convert.verification.record`.
    """
    with new_file(out, overwrite=overwrite) as path, opened.unchanged():
        opened.check_bytes()
        subject, geometry = read_subject(opened, request)
        clips = collect(audio, subject.rate, geometry)
        wanted = [one for one in probes(geometry, clips, rate=subject.rate) if long or one.name != "30-seconds"]
        if not request.language:
            wanted = in_languages(wanted, (name for name in subject.languages if name != subject.language))
        pieces = list(pieces_of(geometry, clips, wanted).values())
        asked, arrays = ask(subject, clips, wanted, pieces, dtype)
        steps = Steps(progress, doing)
        steps.tell("loading the model", len(asked["runs"]))
        if fairseq_python is not None:
            with run_interpreter(fairseq_python, asked, arrays) as answers:
                pack(answers, path, clips)
        else:
            with scratch_directory() as folder:
                with answering(), quiet(), steady():
                    recording.record(asked | {"out": str(folder / "answers")}, arrays, tell=steps.tell)
                pack(folder / "answers", path, clips)
        Recorded(path)  # what was written can be read
        steps.end()
    return out
