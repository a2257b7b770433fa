"""fairseq's answers in a file: asking for them, writing them, and using them where fairseq is not installed.

A recording is a safetensors file that `fairseq_side.tensorfile.write` wrote. Its tensors: `clip.NAME`, the waveforms (16 bit where
they are exactly that); `run.N.STAGE` and `run.N.STAGE.float64`, the numbers of a stage in the run's arithmetic and in
float64: all of them for the outputs, every `step`-th for inner stages, which also have their SHA-256. Its metadata entry
`recording` is JSON: `schema` 1, `fairseq`, `settings`, `ignored_settings`, `patches`, `environment`, `multiple`, `runs`
(each with its probe, frames, transcripts, stages and their floors), `bits` (digests of the bits that the machine computes;
those made before have none), and `description`: the checkpoint's name, size and
SHA-256.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert.audio import Waveform
from convert.errors import ConvertError
from convert.verification.compare import Answer, Stage
from convert.verification.fairseq_side import tensorfile
from convert.verification.fairseq_side.machine import bits
from convert.verification.fairseq_side.numerics import NAMES, environment
from convert.verification.inputs import Cut, Probe, cut
from convert.verification.reference import Description, Subject, run_interpreter, waves_of

SCHEMA = 1


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
            self.arrays, text = tensorfile.read(str(path))
            self.about = json.loads(text)
            if self.about["schema"] != SCHEMA:
                raise ValueError(f"its schema is {self.about['schema']}, expected {SCHEMA}")
            self.checkpoint: dict[str, Any] = self.about["description"]["checkpoint"]
            self.language = str(self.about["description"].get("language", ""))
            self.runs: list[dict[str, Any]] = self.about["runs"]
        except OSError as error:
            raise _bad(path, f"cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise _bad(path, f"is no recording of fairseq-to-hf, or a damaged one ({error})") from None
        keys = ("fairseq", "settings", "ignored_settings", "patches", "environment")
        details = {key: self.about[key] for key in keys}
        unlike = _unlike(kind, self.about.get("bits"), details["environment"])
        skipped = (
            {} if self.about["padded_batches"] else {"padded-batch": "this fairseq counts padded frames otherwise"}
        )
        self.description = Description(kind, details, unlike, skipped)

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
        plain = [run["probe"] for run in self.runs if not run["raw"] and not run["weights"]]
        return [Probe(**probe | {"cuts": tuple(Cut(**piece) for piece in probe["cuts"])}) for probe in plain]

    def pieces(self) -> list[Cut]:
        """The raw waveforms it has answers for."""
        return [Cut(**run["probe"]) for run in self.runs if run["raw"] and not run["weights"]]

    def offered(self, probes: Sequence[Probe], weights: str) -> list[Probe]:
        """Keep the probes it can answer for weights rounded so.

        Raises:
            ConvertError: `bad-recording`: it holds no answers for weights of this type.
        """
        if not any(run["weights"] == weights for run in self.runs if not run["raw"]):
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

    def _find(self, name: str, arithmetic: str, raw: bool) -> dict[str, Any]:
        for run in self.runs:
            if run["raw"] == raw and run["weights"] == self.weights and run["arithmetic"] == arithmetic:
                wanted = run["probe"] if raw else run["probe"]["name"]
                if wanted == name:
                    return run
        raise ConvertError(f"the recording holds no answer for {name}", code="bad-recording", key=str(name))

    def _answer(self, run: dict[str, Any], suffix: str) -> Answer:
        import torch

        stages = {}
        for stage in run["stages"]:
            values = torch.from_numpy(self.arrays[f"run.{run['number']}.{stage['name']}{suffix}"])
            kind = run["arithmetic"] if not suffix else "float64"
            chosen = stage["name"] in ("codes", "generated", "generated.second")
            values = values.long() if chosen else values.to(NAMES[kind])
            stages[stage["name"]] = Stage(tuple(stage["shape"]), values, stage["step"], stage["sha256"])
        return Answer(run["frames"], stages, run.get("beams") or [])

    def run(self, probe: Probe, name: str) -> Answer:
        """Look an answer up."""
        if name == "float64":
            return self._answer(self._find(probe.name, self.last, False), ".float64")
        self.last = name
        return self._answer(self._find(probe.name, name, False), "")

    last = "float32"

    @property
    def blank(self) -> int | None:
        """The blank of fairseq's own criterion; recordings made before do not say it."""
        found: int | None = self.about.get("blank")
        return found

    def spell(self, language: str = "") -> str:
        """Look up how fairseq spells its dictionary, or that of a language."""
        return str(self.about["spellings"].get(language, "") if language else self.about["spelling"])

    def floors(self, probe: Probe, name: str, answer: Answer, exact: Answer) -> dict[str, float]:
        """Look the measured floors up."""
        stages = self._find(probe.name, name, False)["stages"]
        return {stage["name"]: stage["floor"] for stage in stages if stage["floor"] is not None}

    def end_to_end(self, piece: Cut) -> tuple[Waveform | None, Answer, str]:
        """Look an answer from the raw waveform up; what fairseq made of the waveform is not kept."""
        run = self._find(asdict(piece), "float32", True)  # type: ignore[arg-type]
        return None, self._answer(run, ""), (run.get("texts") or [""])[0]


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
    said = {"interpreter": "the other interpreter computes other bits than this one"}
    what = said.get(kind, "this machine computes other bits than the one that recorded")
    return f"{what} ({'; '.join([', '.join(other), *named])})"


def _bad(path: Path, what: str) -> ConvertError:
    hint = "make it with: fairseq-to-hf record CHECKPOINT FILE"
    return ConvertError(f"{path.name} {what}", code="bad-recording", key=path.name, hint=hint)
