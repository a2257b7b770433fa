"""fairseq's answers in a file: asking for them, writing them, and using them where fairseq is not installed.

A recording is a safetensors file that `fairseq_side.tensorfile.write` wrote. Its tensors: `clip.NAME`, the waveforms (16 bit where
they are exactly that); `run.N.STAGE` and `run.N.STAGE.float64`, the numbers of a stage in the run's arithmetic and in
float64: all of them for the outputs, every `step`-th for inner stages, which also have their SHA-256. Its metadata entry
`recording` is JSON, an `About`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convert.audio import Waveform
from convert.errors import ConvertError
from convert.files import read_header
from convert.reading import open_file
from convert.report import parse_json
from convert.typed import Misfit, read
from convert.verification.compare import Answer, Stage
from convert.verification.fairseq_side import tensorfile
from convert.verification.fairseq_side.machine import bits
from convert.verification.fairseq_side.numerics import NAMES, environment
from convert.verification.inputs import SPEECH, Cut, Probe, cut
from convert.verification.reference import Description, Subject, run_interpreter, waves_of

SCHEMA = 1
LARGEST = 4_000_000_000  # bytes of a recording; it is read whole
_LONGEST = 20_000_000  # samples of an input


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a stage: every `step`-th number, the shape and SHA-256 of all, and the measured floor."""

    name: str
    shape: tuple[int, ...]
    sha256: str
    step: int
    floor: float | None

    def __post_init__(self) -> None:
        if self.step < 1 or min(self.shape, default=0) < 0 or not math.isfinite(self.floor or 0.0):
            raise ValueError("step")

    @property
    def count(self) -> int:
        """How many numbers are kept."""
        return -(-math.prod(self.shape) // self.step)


@dataclass(frozen=True, slots=True)
class Run:
    """The answer for one input.

    Args:
        number: names its tensors.
        probe: a `Probe`, or of a raw waveform a `Cut`.
        raw: whether fairseq normalised the waveform.
        weights, arithmetic: the types that weights were rounded to, if they were, and that was computed in.
        frames: the valid ones of each utterance.
        beams: what a decoder wrote, as (tokens, text).
        texts: the transcripts.
    """

    number: int
    probe: Any
    raw: bool
    weights: str
    arithmetic: str
    frames: tuple[int, ...]
    stages: tuple[Kept, ...]
    beams: Any = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(isinstance(beam, list) and list(map(type, beam)) == [list, str] for beam in self.beams or ()):
            raise ValueError("beams")

    @property
    def input(self) -> Probe | Cut:
        """The input."""
        return read(Cut, self.probe, "probe") if self.raw else read(Probe, self.probe, "probe")

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The waveforms of the input."""
        return (self.input,) if isinstance(self.input, Cut) else self.input.cuts


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The checkpoint that a recording is of."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Of:
    """What a recording is of: the checkpoint, and the language of a model with several."""

    checkpoint: Checkpoint
    language: str = ""


@dataclass(frozen=True, slots=True)
class About:
    """The JSON of a recording, as `fairseq_side.recording` writes it.

    Args:
        bits: digests of the bits that the machine computes; old recordings have none.
        blank: the id of fairseq's own blank; old recordings have none.
        padded_batches: whether fairseq counts padded frames as newer versions do.
        spelling, spellings: every symbol of the dictionary, and of each language's, transcribed.
    """

    schema: int
    description: Of
    runs: tuple[Run, ...]
    fairseq: str
    settings: Any
    ignored_settings: Any
    patches: tuple[str, ...]
    environment: Mapping[str, Any]
    padded_batches: bool
    spelling: str
    spellings: Mapping[str, str] = field(default_factory=dict)
    bits: Mapping[str, Any] | None = None
    blank: int | None = None


def ask(
    subject: Subject,
    clips: Mapping[str, Waveform],
    probes: Sequence[Probe],
    pieces: Sequence[Cut],
    weights: str,
) -> tuple[dict[str, Any], dict[str, Waveform]]:
    """Make the request to fairseq_side.

    Args:
        subject: the checkpoint.
        clips: the waveforms by name.
        probes: what to run stage by stage.
        pieces: what to run from the raw waveform.
        weights: the half type that the converted model's weights are rounded to; empty for none.

    Returns:
        The request, and the waveforms it names.
    """
    import torch

    arrays: dict[str, Waveform] = {}
    runs: list[dict[str, Any]] = []

    def add(waves: list[Waveform], **run: Any) -> None:
        names = [f"{len(runs)}.{index}" for index in range(len(waves))]
        arrays.update(dict(zip(names, waves, strict=True)))
        runs.append({"arrays": names, **run})

    wanted = [("", "float32")] + ([(weights, "float32"), (weights, weights)] if weights else [])
    for rounded, arithmetic in wanted:
        for probe in probes:
            described = {"weights": rounded, "arithmetic": arithmetic, "raw": False, "multiple": probe.multiple}
            described["language"] = probe.language
            add(waves_of(clips, probe, subject.normalize), **described, padded=probe.padded, probe=asdict(probe))
    for rounded in dict.fromkeys(("", weights)):
        for piece in pieces:
            described = {"weights": rounded, "arithmetic": "float32", "raw": True, "multiple": None, "language": ""}
            add([cut(dict(clips), piece)], **described, padded=False, probe=asdict(piece))
    description: dict[str, Any] = {"checkpoint": {"name": subject.name, "size": subject.size, "sha256": subject.sha256}}
    description |= {"language": subject.language} if subject.language else {}
    return subject.request() | {"runs": runs, "threads": torch.get_num_threads(), "description": description}, arrays


def answers(
    subject: Subject,
    clips: Mapping[str, Waveform],
    probes: Sequence[Probe],
    pieces: Sequence[Cut],
    weights: str,
    python: str,
) -> Recorded:
    """Let another interpreter answer, now."""
    request, arrays = ask(subject, clips, probes, pieces, weights)
    with run_interpreter(python, request, arrays) as path:
        return Recorded(path, "interpreter")


def pack(made: Path, path: Path, clips: Mapping[str, Waveform]) -> None:
    """Write a fresh recording with the clips in place of the waveforms that were cut from them."""
    import numpy as np

    arrays, about = tensorfile.read(str(made))
    kept = {name: value for name, value in arrays.items() if not name.startswith("waveform.")}
    for name, clip in clips.items():
        whole = np.round(clip * 32768)
        exact = bool((whole == clip * 32768).all()) and bool((np.abs(whole) < 32768).all())
        kept[f"clip.{name}"] = whole.astype(np.int16) if exact else clip
    tensorfile.write(str(path), kept, about)


class Recorded:
    """Answers that were given earlier, or elsewhere.

    Args:
        path: the recording.
        kind: `recording` or `interpreter`.

    Raises:
        ConvertError: `bad-recording`, status 2: it is none, or of a newer version.
    """

    def __init__(self, path: Path, kind: str = "recording") -> None:
        try:
            self.arrays, about = _read(path)
            self.about = read(About, about)
            self._check(kind)
        except OSError as error:
            raise _bad(path, f"cannot be read: {error.strerror or error}") from None
        except (ValueError, Misfit) as error:
            raise _bad(path, f"is a damaged recording: {error}") from None
        except KeyError as error:
            raise _bad(path, f"is a damaged recording: it lacks {error.args[0]}") from None
        self.checkpoint = asdict(self.about.description.checkpoint)
        self.language = self.about.description.language
        keys = ("fairseq", "settings", "ignored_settings", "patches", "environment")
        details = {key: getattr(self.about, key) for key in keys} | {"patches": list(self.about.patches)}
        unlike = _unlike(kind, self.about.bits, details["environment"])
        skipped = {} if self.about.padded_batches else {"padded-batch": "this fairseq counts padded frames otherwise"}
        self.description = Description(kind, details, unlike, skipped)

    def _check(self, kind: str) -> None:
        """Refuse answers without their tensors, and inputs without their clips.

        Raises:
            ValueError, Misfit: what is wrong.
        """
        for run in self.about.runs:
            if run.arithmetic not in NAMES:
                raise ValueError(f"unknown arithmetic {run.arithmetic}")
            for stage in run.stages:
                for suffix in ("", ".float64"):
                    name = f"run.{run.number}.{stage.name}{suffix}"
                    if self.arrays[name].shape != (stage.count,):
                        raise ValueError(f"{name} has the shape {self.arrays[name].shape}, expected ({stage.count},)")
            for piece in run.cuts:
                clip = self.arrays.get(f"clip.{piece.clip}")
                known = kind != "recording" or (clip is not None and clip.ndim == 1 and clip.size and clip.itemsize < 8)
                if not known or not 0 < piece.samples <= _LONGEST or not math.isfinite(piece.gain):
                    raise ValueError(f"an input of {piece.samples} samples of {piece.clip}")
        if SPEECH not in {piece.clip for piece in self.pieces()} or "quiet" not in {one.name for one in self.probes()}:
            raise ValueError("it lacks the inputs that every recording has")

    @property
    def clips(self) -> dict[str, Waveform]:
        """The waveforms that the probes were cut from."""
        import numpy as np

        found = {name[5:]: value for name, value in self.arrays.items() if name.startswith("clip.")}
        return {
            name: (value.astype(np.float32) / np.float32(32768) if value.dtype == np.int16 else value)
            for name, value in found.items()
        }

    def probes(self) -> list[Probe]:
        """The inputs it has answers for."""
        return [run.input for run in self.about.runs if isinstance(run.input, Probe) and not run.weights]

    def pieces(self) -> list[Cut]:
        """The raw waveforms it has answers for."""
        return [run.input for run in self.about.runs if isinstance(run.input, Cut) and not run.weights]

    def offered(self, probes: Sequence[Probe], weights: str) -> list[Probe]:
        """Keep the probes it can answer for weights rounded so.

        Raises:
            ConvertError: `bad-recording`: it holds no answers for weights of this type.
        """
        if not any(run.weights == weights for run in self.about.runs if not run.raw):
            raise ConvertError(
                f"the recording holds no answers for weights rounded to {weights}",
                code="bad-recording",
                hint=f"record them: fairseq-to-hf record CHECKPOINT FILE --dtype {weights}",
            )
        return [probe for probe in probes if probe.name not in self.description.skipped]

    def arithmetic(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Choose which answers `run` gives."""
        return contextlib.nullcontext()

    def round_weights(self, name: str) -> None:
        """Choose the answers of rounded weights."""
        self.weights = name

    weights = ""

    def _find(self, wanted: str | Cut, arithmetic: str) -> Run:
        for run in self.about.runs:
            name = run.input if isinstance(run.input, Cut) else run.input.name
            if (name, run.weights, run.arithmetic) == (wanted, self.weights, arithmetic):
                return run
        raise ConvertError(f"the recording holds no answer for {wanted}", code="bad-recording", key=str(wanted))

    def _answer(self, run: Run, suffix: str) -> Answer:
        import torch

        stages = {}
        for stage in run.stages:
            values = torch.from_numpy(self.arrays[f"run.{run.number}.{stage.name}{suffix}"])
            kind = run.arithmetic if not suffix else "float64"
            chosen = stage.name in ("codes", "generated", "generated.second")
            values = values.long() if chosen else values.to(NAMES[kind])
            stages[stage.name] = Stage(stage.shape, values, stage.step, stage.sha256)
        return Answer(list(run.frames), stages, run.beams)

    def run(self, probe: Probe, name: str) -> Answer:
        """Look an answer up."""
        if name == "float64":
            return self._answer(self._find(probe.name, self.last), ".float64")
        self.last = name
        return self._answer(self._find(probe.name, name), "")

    last = "float32"

    @property
    def blank(self) -> int | None:
        """The blank of fairseq's own criterion; recordings made before do not say it."""
        return self.about.blank

    def spell(self, language: str = "") -> str:
        """Look up how fairseq spells its dictionary, or that of a language."""
        return self.about.spellings.get(language, "") if language else self.about.spelling

    def floors(self, probe: Probe, name: str, answer: Answer, exact: Answer) -> dict[str, float]:
        """Look the measured floors up."""
        stages = self._find(probe.name, name).stages
        return {stage.name: stage.floor for stage in stages if stage.floor is not None}

    def end_to_end(self, piece: Cut) -> tuple[Waveform | None, Answer, str]:
        """Look an answer from the raw waveform up; what fairseq made of the waveform is not kept."""
        run = self._find(piece, "float32")
        return None, self._answer(run, ""), (*run.texts, "")[0]


def _unlike(kind: str, theirs: Any, there: Mapping[str, Any]) -> str:
    """Say why the bits of answers that were not computed here cannot be had here; nothing where they can."""
    if not isinstance(theirs, dict):
        return "the recording has no digest of the bits that its machine computes"
    ours, here = bits(), environment()
    other = sorted(what for what in ours | theirs if ours.get(what) != theirs.get(what))
    if not other:
        return ""
    named = [
        f"{key} {there.get(key)} there, {here[key]} here"
        for key in here
        if key != "python" and here[key] != there.get(key)
    ]
    reasons = {"interpreter": "the other interpreter computes other bits than this one"}
    what = reasons.get(kind, "this machine computes other bits than the one that recorded")
    return f"{what} ({'; '.join([', '.join(other), *named])})"


def _read(path: Path) -> tuple[Any, Any]:
    """Read the arrays and the description of a recording."""
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST:
                raise ValueError
            read_header(file)
            file.seek(0)
            arrays, text = tensorfile.parse(file)
        about = parse_json(text.encode(), path.name)
        schema = about["schema"]
    except (ConvertError, ValueError, KeyError, TypeError):
        raise _bad(path, "is not a recording that `fairseq-to-hf record` wrote, or is damaged") from None
    if schema != SCHEMA:
        raise _bad(path, f"is a recording of schema {schema}, and this version reads schema {SCHEMA}")
    return arrays, about


def _bad(path: Path, what: str) -> ConvertError:
    hint = "make it with: fairseq-to-hf record CHECKPOINT FILE"
    return ConvertError(f"{path.name} {what}", code="bad-recording", key=path.name, hint=hint)
