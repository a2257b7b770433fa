"""The verification as a whole: weights, files, vocabulary, outputs on every device, controls, end to end, and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.audio import Waveform
from convert.checkpoint import Checkpoint
from convert.checkpoint.opened import UNSEEN
from convert.directory import ModelDirectory
from convert.errors import ConvertError, MismatchError, Problem
from convert.families.planning import list_languages
from convert.files import Hashes
from convert.loading import quiet
from convert.package import compare_opened
from convert.report import quoted
from convert.request import request_again
from convert.sources import dictionary_beside, open_source
from convert.verification import controls, expected
from convert.verification.device_run import LONG, Work, on_device
from convert.verification.devices import choose, describe, steady
from convert.verification.inputs import QUIET, SPEECH, Cut, Geometry, Probe, collect, in_languages, probes
from convert.verification.recording import Recorded, answers
from convert.verification.reference import Description, Live, Reference, Subject
from convert.verification.report import Findings, Verification, write
from convert.verification.subject import check_source, half_type, read_subject
from convert.verification.target import attention_of

Progress = Callable[[int, int], None]
Doing = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `convert.verify`, which explains them, beside the checkpoint and the model directory."""

    reference: Path | None
    fairseq_python: str | None
    devices: tuple[str, ...]
    audio: tuple[str | Path, ...]
    require: str | None
    dictionary: Path | None
    base: str | Path | None
    long: bool
    languages: tuple[str, ...]
    write: bool
    progress: Progress | None
    doing: Doing | None

    def __post_init__(self) -> None:
        if self.require not in (None, "identical", "rounding"):
            raise ConvertError(f"{self.require!r} is neither identical nor rounding", code="usage", key="--require")
        if self.reference is not None and (self.fairseq_python is not None or self.audio):
            other = "--audio" if self.audio else "--fairseq-python"
            raise ConvertError(
                f"a recording has its own inputs and answers: leave {other} out", code="usage", key="--reference"
            )


def verify(checkpoint: str | Path, model_dir: Path, options: Options) -> Verification:
    """Verify; `convert.verify` documents the result and the errors."""
    directory = ModelDirectory(model_dir)
    known = Hashes()
    files = expected.hashes(model_dir, known)
    opening = directory.record.asked.opening
    with (
        open_source(checkpoint, base=options.base, dictionary=options.dictionary, **opening) as opened,
        opened.unchanged(),
    ):
        digest = opened.sha256()
        check_source(directory, opened.path.name, digest)
        dictionary = options.dictionary or dictionary_beside(opened)
        request = request_again(directory, opened, dictionary=dictionary)
        subject, geometry = read_subject(opened, request, digest)
        others = _others(subject, request.language, options.languages)
        chosen, absent = choose(options.devices)
        recorded = _recording(options.reference, subject) if options.reference is not None else None
        clips = recorded.clips if recorded else collect(options.audio, subject.rate, geometry)
        made = probes(geometry, clips, rate=subject.rate)
        wanted = recorded.probes() if recorded else in_languages(made, others, geometry)
        wanted = [probe for probe in wanted if options.long or probe.name != LONG]
        wanted = [probe for probe in wanted if not probe.language or probe.language in others]
        pieces = pieces_of(geometry, clips, wanted)
        half, rounded = half_type(directory)
        findings = Findings()
        if not options.long:
            findings.skipped[LONG] = "left out, as asked"
        run = {subject.language, *(probe.language for probe in wanted)}
        findings.skipped |= {
            f"language {name}": "its bytes only, as asked" for name in subject.languages if name not in run
        }
        if options.fairseq_python is not None:
            recorded = answers(subject, clips, wanted, list(pieces.values()), rounded, options.fairseq_python)
        if recorded and options.long and LONG not in {probe.name for probe in wanted}:
            findings.skipped[LONG] = "the recording has no answers for it"
        findings.skipped |= on_trust(opened, subject, directory, bool(dictionary))
        steps = Steps(options.progress, options.doing)
        steps.tell("the bytes and the files", 2 * len(wanted))
        _check_files(opened, directory, digest, files, dictionary, findings)
        work = Work(subject, directory, clips, wanted, pieces, half, rounded, options.require, steps.tell)
        description = None
        with steady(), quiet():
            for device in chosen:
                steps.tell("loading both models", 2 * len(wanted))
                side: Reference = recorded if recorded is not None else Live(subject, clips, device)
                description = side.description
                try:
                    on_device(work, side, device, findings, first=device == chosen[0])
                except Exception as error:  # noqa: BLE001
                    # what makes transformers fail in a directory that is not the expected one is its own fault
                    findings.problems += _failure(error, directory.path.name, bool(findings.problems))
                del side
            surroundings = describe(chosen, attention_of(directory.architecture))
        findings.problems += controls.missing(findings.controls)
        findings.skipped |= dict(description.skipped) if description else {}
        known.check()  # what was compared and computed with is what was hashed
        done = findings.finish(
            files=files,
            checkpoint={"name": subject.name, "size": subject.size, "sha256": subject.sha256},
            tensors=directory.count,
            reference=_described(description),
            environment=surroundings,
            missing=sorted(absent),
        )
    if options.write:
        write(directory.path, done.report)
    steps.end()
    return done


def on_trust(opened: Checkpoint, subject: Subject, directory: ModelDirectory, named: bool) -> dict[str, str]:
    """Say what the checkpoint does not hold, so that comparing with it proves nothing about that.

    Args:
        opened: the checkpoint.
        subject: the same for fairseq.
        directory: what it was converted to.
        named: whether its dictionary is a file that was named.
    """
    made = {}
    if opened.base is not None:
        made["settings"] = (
            f"the checkpoint has none, they are those of {opened.base.name}; {UNSEEN} do not show in its tensors"
        )
    if subject.symbols and opened.dictionary is None and not named:
        compare = "" if directory.record.asked.data_config else "; --dict compares yours with it"
        made["dictionary"] = f"the checkpoint has none, the directory's own was taken{compare}"
    return made


def _failure(error: Exception, name: str, differs: bool) -> Sequence[Problem]:
    """List what an error says about the model directory; one that says nothing about it is raised again."""
    if isinstance(error, ConvertError):
        if error.code == "load":
            return error.problems
        raise error
    if not differs or isinstance(error, (ImportError, MemoryError, OSError)):
        raise error
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return [Problem("load", name, f"transformers cannot run it: {reason}")]


class Steps:
    """How far a verification has come, in runs of either side.

    Args:
        progress: called with (runs done, runs that are known of so far).
        doing: called with what is done next.
    """

    def __init__(self, progress: Progress | None, doing: Doing | None) -> None:
        self.progress, self.doing, self.done = progress, doing, 0

    def tell(self, what: str, left: int) -> None:
        """Say what is done next, and how many more are known to follow it."""
        if self.doing:
            self.doing(what)
        if self.progress:
            self.progress(self.done, self.done + left + 2)
        self.done += 1

    def end(self) -> None:
        """Say that all is done."""
        if self.progress:
            self.progress(self.done, self.done)


def _others(subject: Subject, asked: str, languages: Sequence[str]) -> list[str]:
    """List the languages to run beside that of the weights: those that were named, or all."""
    unknown = [name for name in languages if name not in subject.languages and name != subject.language]
    if unknown:
        raise ConvertError(
            f"{subject.name} has no language {unknown[0]!r}",
            code="unknown-language",
            key="--lang",
            hint=list_languages(subject.languages),
        )
    found = [] if asked else [name for name in subject.languages if name != subject.language]
    return [name for name in found if not languages or name in languages]


def _recording(path: Path, subject: Subject) -> Recorded:
    recorded = Recorded(path)
    if recorded.checkpoint["sha256"] != subject.sha256:
        made_of = f"{recorded.checkpoint['name']} ({recorded.checkpoint['sha256'][:12]}…)"
        raise ConvertError(
            f"{path.name} is a recording of {made_of}, not of {subject.name} ({subject.sha256[:12]}…)",
            code="other-checkpoint",
            key=path.name,
            hint=f"record this one: fairseq-to-hf record {quoted(subject.name)} FILE",
        )
    if recorded.blank is None and "<ctc_blank>" in subject.symbols:
        raise ConvertError(
            f"{path.name} was made by a version that took <ctc_blank> for the blank: its texts are not fairseq's",
            code="bad-recording",
            key=path.name,
            hint=f"record again: fairseq-to-hf record {quoted(subject.name)} FILE",
        )
    if recorded.language != subject.language:
        raise ConvertError(
            f"{path.name} was recorded in the language {recorded.language!r}, the model is of {subject.language!r}",
            code="other-language",
            key=path.name,
            hint=f"record it: fairseq-to-hf record {quoted(subject.name)} FILE --lang {quoted(subject.language)}",
        )
    return recorded


def _check_files(
    opened: Checkpoint,
    directory: ModelDirectory,
    sha256: str,
    files: Mapping[str, str],
    dictionary: Path | None,
    findings: Findings,
) -> None:
    """Check what needs no model: every tensor's bytes, every value of every JSON file; and that both checks see."""

    def bytes_of(path: Path) -> list[Problem]:
        return compare_opened(opened, ModelDirectory(path), dictionary=dictionary)

    findings.problems += bytes_of(directory.path)
    findings.controls.append(controls.one_unit(directory.path, _some_tensor(directory), bytes_of))
    meant = expected.expect(opened, directory, sha256, dictionary=dictionary)
    findings.problems += expected.compare_files(directory, meant.files)
    problems, differing = expected.compare_records(directory, meant, files)
    findings.problems += problems
    findings.skipped |= differing
    findings.controls.append(controls.wrong_setting(meant.files["config.json"]))


def _some_tensor(directory: ModelDirectory) -> str:
    """Choose the tensor for the control of one unit: the first layer's query matrix."""
    ends: tuple[str, ...] = ("layers.0.attention.q_proj.weight", "layers.0.self_attn.linear_q.weight")
    ends += ("layers.0.self_attn.q_proj.weight",)
    names = [name for name in directory.tensors if name.endswith(ends)]
    if not names:
        raise MismatchError(f"{directory.path.name} has no attention layer", code="load", key=str(directory.path))
    return names[0]


def _described(description: Description | None) -> dict[str, Any]:
    """Put the reference into the report's words."""
    import torch

    if description is None:
        return {"kind": "", "fairseq": "", "torch": "", "patches": []}
    details = dict(description.details)
    elsewhere = details.pop("environment", None)
    made = {"kind": description.kind, "torch": (elsewhere or {}).get("torch", str(torch.__version__)), **details}
    return made | {"environment": elsewhere or "the same", "unlike": description.unlike}


def pieces_of(geometry: Geometry, clips: Mapping[str, Waveform], wanted: Sequence[Probe]) -> dict[str, Cut]:
    """Choose the raw waveforms that go from end to end: every clip, and the bundled one quietly."""
    gain = next(piece.gain for probe in wanted if probe.name == "quiet" for piece in probe.cuts)
    made = {}
    for name, clip in clips.items():
        frames = geometry.frames(len(clip))
        even = frames // geometry.multiple * geometry.multiple
        made[name] = Cut(name, geometry.samples(even or frames))
    return made | {f"{SPEECH} at {QUIET:g} dBFS": replace(made[SPEECH], gain=gain)}
