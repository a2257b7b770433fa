"""fairseq's side: running in this process, in another interpreter, or recorded earlier."""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from convert.audio import Waveform
from convert.errors import ConvertError
from convert.families import Interface
from convert.files import create, scratch_directory
from convert.loading import quiet
from convert.verification import fairseq_side
from convert.verification.compare import Answer, Stage, distances
from convert.verification.fairseq_side import opening, tensorfile
from convert.verification.fairseq_side.importing import CannotBuildError
from convert.verification.inputs import Cut, Probe, cut, normalised

if TYPE_CHECKING:
    import torch

HINT = "install fairseq here, or name an interpreter that has it with --fairseq-python, or a recording with --reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject(Interface):
    """What the reference is asked about: a checkpoint, and how its model is built, fed and read.

    Args:
        name, size, sha256: of the file.
        handed: settings, and where the tensors are; see `convert.verification.handed.handed`.
    """

    name: str
    size: int
    sha256: str
    handed: Mapping[str, Any]

    def in_language(self, language: str) -> Subject:
        """Return the same with another language."""
        return replace(self, symbols=self.languages[language][0], language=language)

    def request(self) -> dict[str, Any]:
        """The request of `fairseq_side.opening.open_reference`."""
        return {
            **self.handed,
            "symbols": list(self.symbols),
            "special": list(self.special),
            "blank": self.blank,
            "post_process": self.post_process,
            "rate": self.rate,
            "language": self.language,
            "languages": {name: row for name, (_, row) in self.languages.items()},
            "beam": self.beam,
            "length_penalty": self.length_penalty,
        }


@dataclass(frozen=True, slots=True)
class Description:
    """Which reference it was.

    Args:
        kind: `in-process`, `interpreter` or `recording`.
        details: versions, who read the settings, patches.
        unlike: why its bits cannot be ours; empty where they can.
        skipped: what it cannot answer, with the reason.
    """

    kind: str
    details: Mapping[str, Any]
    unlike: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)


class Reference(Protocol):
    """Answers of fairseq's model."""

    description: Description

    def offered(self, probes: Sequence[Probe], weights: str) -> list[Probe]:
        """Keep the probes it can answer."""

    def arithmetic(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Compute in another floating point type."""

    def round_weights(self, name: str) -> None:
        """Round every weight to a half type."""

    def run(self, probe: Probe, name: str) -> Answer:
        """Compute every stage, in the arithmetic of this name."""

    def floors(self, probe: Probe, name: str, answer: Answer, exact: Answer) -> dict[str, float]:
        """Measure how far its arithmetic is from its own in float64, by stage."""

    @property
    def blank(self) -> int | None:
        """The id that fairseq takes for CTC's blank; -1 for a model without one, `None` where the reference does not say."""

    def spell(self, language: str = "") -> str:
        """Transcribe every symbol of the dictionary, in order; of a language's, where one is named."""

    def end_to_end(self, piece: Cut) -> tuple[Waveform | None, Answer, str]:
        """Go from a raw waveform to text: what fairseq made of the waveform, the answer, the transcript."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk that the answers go to, which is not fairseq's fault


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Turn whatever fairseq and torch raise while they run into one error.

    Raises:
        ConvertError: `no-fairseq` or `fairseq`, status 2.
    """
    try:
        yield
    except CannotBuildError as error:
        raise ConvertError(f"{error}", code="no-fairseq", hint=HINT) from error
    except (ConvertError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        hint = "another version of fairseq may: --fairseq-python PYTHON"
        raise ConvertError(f"fairseq cannot run the model: {reason}", code="fairseq", hint=hint) from error


class Live:
    """fairseq in this process.

    Args:
        subject: the checkpoint.
        clips: the waveforms by name.
        device: where it runs.
    """

    def __init__(self, subject: Subject, clips: Mapping[str, Waveform], device: str) -> None:
        with answering(), quiet():
            self.inner = opening.open_reference(subject.request() | {"device": device})
        self.subject, self.clips = subject, dict(clips)
        skipped = {} if self.inner.masks_like_main else {"padded-batch": _OLD_MASK}
        self.description = Description("in-process", self.inner.info, skipped=skipped)

    def offered(self, probes: Sequence[Probe], weights: str) -> list[Probe]:
        """Keep every probe."""
        return [probe for probe in probes if probe.name not in self.description.skipped]

    def arithmetic(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Compute in another floating point type."""
        context: contextlib.AbstractContextManager[None] = self.inner.arithmetic(name)
        return context

    def round_weights(self, name: str) -> None:
        """Round every weight to a half type."""
        self.inner.round_weights(name)

    def run(self, probe: Probe, name: str) -> Answer:
        """Compute every stage."""
        batch, lengths = tensor(self.clips, probe, self.subject.normalize)
        with answering():
            self.inner.set_language(probe.language)
            frames, stages = self.inner.run(batch, lengths, probe.multiple)
        return Answer(frames, {key: Stage(tuple(value.shape), value) for key, value in stages.items()})

    def floors(self, probe: Probe, name: str, answer: Answer, exact: Answer) -> dict[str, float]:
        """Measure how far its arithmetic is from its own in float64."""
        return distances(answer.stages, exact.stages)

    @property
    def blank(self) -> int:
        """The blank of fairseq's own criterion."""
        return self.inner.blank

    def spell(self, language: str = "") -> str:
        """Transcribe every symbol of the dictionary, in order."""
        return str(self.inner.spell(language))

    def end_to_end(self, piece: Cut) -> tuple[Waveform | None, Answer, str]:
        """Go from a raw waveform to text."""
        with answering():
            self.inner.set_language("")
            signal = self.inner.normalise(cut(self.clips, piece), self.subject.rate)
            frames, stages = self.inner.run(signal[None])
            beams = self.inner.beams()
        answer = Answer(frames, {key: Stage(tuple(value.shape), value) for key, value in stages.items()}, beams)
        paths = self.inner.paths(stages, frames)
        return signal.cpu().numpy(), answer, self.inner.transcribe(paths[0].tolist()) if len(paths) else ""


_OLD_MASK = "this fairseq splits the padding mask evenly, and counts other frames than newer ones and transformers"


def tensor(clips: Mapping[str, Waveform], probe: Probe, normalize: bool) -> tuple[torch.Tensor, list[int] | None]:
    """Make the models' input of a probe: (batch, samples) padded with zeros, and the lengths of a padded batch."""
    import torch

    waves = [torch.from_numpy(wave) for wave in waves_of(clips, probe, normalize)]
    lengths = [len(wave) for wave in waves] if probe.padded else None
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths


def waves_of(clips: Mapping[str, Waveform], probe: Probe, normalize: bool) -> list[Waveform]:
    """Cut a probe's waveforms, normalised as the task says."""
    waves = [cut(dict(clips), piece) for piece in probe.cuts]
    return [normalised(wave) for wave in waves] if normalize else waves


@contextlib.contextmanager
def run_interpreter(python: str, request: Mapping[str, Any], arrays: Mapping[str, Waveform]) -> Iterator[Path]:
    """Run fairseq_side in another interpreter; yield the recording that it wrote.

    Raises:
        ConvertError: `no-fairseq`, status 2: the interpreter, fairseq in it, or the model in that fairseq fails.
    """
    with scratch_directory() as work:
        languages = {request["language"], *(run["language"] for run in request["runs"])}
        tensorfile.write(str(work / "waveforms"), dict(arrays), "{}")
        asked = dict(request) | {"waveforms": str(work / "waveforms"), "out": str(work / "answers")}
        asked["groups"] = {name: asked["groups"][name] for name in languages if name in asked["groups"]}
        with create(work / "request.json") as file:
            file.write(json.dumps(asked).encode())
        command = [python, str(Path(fairseq_side.__path__[0]).resolve()), "request.json"]
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ConvertError(f"{python}: {error.strerror}", code="no-fairseq", key=python, hint=HINT) from None
        if done.returncode or not (work / "answers").is_file():
            last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            raise ConvertError(f"{python}: {last}", code="no-fairseq", key=python, hint=HINT)
        yield work / "answers"
