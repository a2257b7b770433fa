"""Makes a recording: fairseq's answers to the probe inputs, with what is needed to use them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `convert.record`, which explains them, beside those that a conversion has too."""

    audio: tuple[str | Path, ...]
    fairseq_python: str | None
    dtype: str
    long: bool
    overwrite: bool
    progress: Progress | None
    doing: Doing | None


def make_recording(opened: Checkpoint, out: Path, request: Request, options: Options) -> Path:
    """Run fairseq and write its answers.

    Args:
        opened: the checkpoint.
        out: the file.
        request: what a conversion would be asked for.
        options: as for `convert.record`.
    """
    with new_file(out, overwrite=options.overwrite) as path, opened.unchanged():
        opened.check_bytes()
        subject, geometry = read_subject(opened, request)
        clips = collect(options.audio, subject.rate, geometry)
        wanted = [one for one in probes(geometry, clips, rate=subject.rate) if options.long or one.name != "30-seconds"]
        if not request.language:
            others = (name for name in subject.languages if name != subject.language)
            wanted = in_languages(wanted, others, geometry)
        pieces = list(pieces_of(geometry, clips, wanted).values())
        asked, arrays = ask(subject, clips, wanted, pieces, options.dtype)
        steps = Steps(options.progress, options.doing)
        steps.tell("loading the model", len(asked["runs"]))
        if options.fairseq_python is not None:
            with run_interpreter(options.fairseq_python, asked, arrays) as answers:
                pack(answers, path, clips)
        else:
            with scratch_directory() as folder:
                with answering(), quiet(), steady():
                    recording.record(asked | {"out": str(folder / "answers")}, arrays, tell=steps.tell)
                pack(folder / "answers", path, clips)
        Recorded(path)  # what was written can be read
        steps.end()
    return out
