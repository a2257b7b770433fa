"""Everything that is checked on one device: the vocabulary, every input, half precision, the controls, and waveform to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.audio import Waveform
from convert.conversion import Record
from convert.directory import ModelDirectory
from convert.errors import Problem
from convert.verification import controls, endtoend, generation, vocabulary
from convert.verification.compare import SCORES, Answer, Difference, Stage, distances
from convert.verification.inputs import Cut, Probe
from convert.verification.judge import Judged, Tell, judge
from convert.verification.reference import Live, Reference, Subject, tensor
from convert.verification.report import Findings, curves_of, finite, run_of
from convert.verification.target import SpeechToTextTarget, Target, load

if TYPE_CHECKING:
    import torch

CLIP = "speech-even"  # the input that controls run on, and whose floors are always measured
LONG = "30-seconds"
Spell = Callable[[Sequence[int]], str]  # from the best symbol of every frame, or the best label, to text


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done, the same on every device.

    Args:
        subject: the checkpoint, for the reference.
        directory: the model directory.
        clips: the waveforms by name.
        probes: what is compared stage by stage.
        pieces: what goes from waveform to text.
        half: the half type of the directory's weights, or nothing.
        rounded: the half type that the conversion rounded them to, or nothing.
        require: `identical` or `rounding` where the user asked for it.
        tell: called before each run of a side with what it is, and how many more are known to follow.
    """

    subject: Subject
    directory: ModelDirectory
    clips: Mapping[str, Waveform]
    probes: Sequence[Probe]
    pieces: Mapping[str, Cut]
    half: str
    rounded: str
    require: str | None
    tell: Tell

    @property
    def record(self) -> Record:
        """What conversion.json says."""
        return self.directory.record


def on_device(work: Work, reference: Reference, device: str, findings: Findings, *, first: bool) -> None:
    """Run all checks on one device.

    Args:
        work: what is to be done.
        reference: fairseq's side.
        device: where both run.
        findings: what is found is added here.
        first: whether the checks that depend on no device run too.

    Raises:
        ConvertError: `load`, status 1: transformers cannot load the directory.
    """
    if reference.blank is not None:
        work = replace(work, subject=replace(work.subject, blank=reference.blank))
    target = load(work.directory.path, device)
    spell = _vocabulary(work, reference, target, findings) if first else None
    if work.half:
        _half_precision(work, reference, target, device, findings)
    else:
        _runs(work, reference, target, device, "float32", "float32", findings)
    if first:
        _end_to_end(work, reference, target, spell, findings)


def _vocabulary(work: Work, reference: Reference, target: Target, findings: Findings) -> Spell | None:
    """Check what the classes mean, and return what turns them into text."""
    if not work.subject.symbols or work.record.architecture.head == "encoder":
        return None
    if "id2label" in work.directory.config:
        return _labels(work, reference, target, findings)
    folder: Path = work.directory.path
    processor = vocabulary.load_processor(folder)
    findings.problems += vocabulary.check(processor, work.directory.config, work.subject, reference.spell())
    for language in dict.fromkeys(probe.language for probe in work.probes if probe.language):
        chosen, subject = vocabulary.load_processor(folder, language), work.subject.in_language(language)
        config = work.directory.config | {"vocab_size": len(subject.symbols)}  # load_adapter sets it likewise
        found = vocabulary.check(chosen, config, subject, reference.spell(language))
        findings.problems += [replace(problem, key=f"{language}: {problem.key}") for problem in found]
    tokens = vocabulary.tokens_of(processor.tokenizer, len(work.subject.symbols))
    findings.controls.append(controls.blank_and_pad(tokens, work.subject))
    return partial(vocabulary.transcribe, processor, subject=work.subject)


def _labels(work: Work, reference: Reference, target: Target, findings: Findings) -> Spell:
    config, spelling = target.model.config, reference.spell()
    labels = [str(config.id2label.get(index)) for index in range(config.num_labels)]
    findings.problems += vocabulary.check_labels(labels, work.subject, spelling)
    if len(labels) > 1:
        findings.controls.append(controls.exchanged_labels(labels, work.subject, spelling))
    else:
        findings.absent["two labels exchanged"] = "the model has one class"
    return lambda path: " ".join(labels[index] for index in path)


def _runs(
    work: Work, reference: Reference, target: Target, device: str, dtype: str, arithmetic: str, findings: Findings
) -> list[Judged]:
    """Judge every input in one type; run the controls where both sides compute in float32."""
    offered = reference.offered(work.probes, work.rounded if dtype != "float32" else "")
    offered = [probe for probe in offered if arithmetic == "float32" or probe.name != LONG]
    judged = judge(
        reference,
        target,
        work.clips,
        offered,
        normalize=work.subject.normalize,
        arithmetic=arithmetic,
        measured=CLIP,
        tell=lambda what, left: work.tell(f"{dtype}: {what}", left),
    )
    for one in judged:
        require, why = required(work, reference, target, one.probe, device, dtype, arithmetic)
        findings.runs.append(run_of(one, device, dtype, require, why))
        findings.problems += _demand(one, device, dtype, require)
    clip = next((one for one in judged if one.probe.name == CLIP), None)
    if arithmetic == dtype == "float32":
        findings.padding += [_padding(work, target, one, device) for one in judged if one.probe.follows]
        if clip is not None and clip.exact.stages:
            _usual_attention(work, reference, target, clip, device, findings)
    made: list[controls.Control] = []
    if clip is not None and arithmetic == "float32" and clip.verdict != "different":
        batch = tensor(work.clips, clip.probe, work.subject.normalize)
        work.tell("deliberate mistakes", 1)
        others = [name for name in work.directory.record.languages if name != work.subject.language]
        made, absent = controls.on_outputs(target, clip, batch, device, others)
        findings.controls += made
        findings.absent |= absent
    findings.curves += curves_of(judged, made, device, dtype)
    return judged


def _usual_attention(
    work: Work, reference: Reference, target: Target, clip: Judged, device: str, findings: Findings
) -> None:
    """Judge one input with the attention of users who ask for none, where another one does fairseq's arithmetic."""
    usual = target.usual()
    if usual is None:
        return
    for one in judge(reference, usual, work.clips, [clip.probe], normalize=work.subject.normalize, given=clip):
        attention = usual.model.config._attn_implementation
        one.probe = replace(one.probe, name=f"{CLIP}, {attention}")
        why = f"{attention}, which transformers chooses when asked for no attention, computes in another order than fairseq"
        findings.runs.append(run_of(one, device, "float32", "rounding", why))
        findings.problems += _demand(one, device, "float32", "rounding")


def _padding(work: Work, target: Target, followed: Judged, device: str) -> dict[str, Any]:
    """Measure what a padded batch is off where transformers counts the frames itself, and fairseq counts others.

    The model that follows fairseq's frames was just judged to be the same: it stands for fairseq.
    """
    import torch

    waveforms, lengths = tensor(work.clips, followed.probe, work.subject.normalize)
    found: dict[str, torch.Tensor] = {}

    def visit(stage: str, values: torch.Tensor) -> None:
        if stage == target.output:
            found[stage] = values.clone()

    counts = target.run(waveforms, lengths, visit), followed.frames
    outputs = found[target.output], followed.ours[target.output].values
    pairs = zip(outputs, counts, strict=True)  # what was pooled over the frames has one row for each utterance
    utterances = [torch.split(values, count if len(values) == sum(count) else 1) for values, count in pairs]
    apart = [float((a[: len(b)] - b[: len(a)]).abs().max()) for a, b in zip(*utterances, strict=True)]
    return {
        "device": device,
        "samples": lengths,
        "fairseq_frames": counts[1],
        "transformers_frames": counts[0],
        "stage": target.output,
        "max_abs_difference": finite(max(apart)),
    }


def required(
    work: Work, reference: Reference, target: Target, probe: Probe, device: str, dtype: str, arithmetic: str
) -> tuple[str, str]:
    """Say what is required of an input, and why not more; from facts, never from names of models."""
    if work.require is not None:
        return work.require, "asked for"
    if not probe.exact:
        return "rounding", probe.why
    if arithmetic != "float32":
        return "rounding", "fairseq computes its norms in float32, transformers in the half type"
    if dtype != "float32":
        return "rounding", "the conversion rounded the weights"
    if rounds(work.record):
        return "rounding", rounds(work.record)
    if target.rounds:
        return "rounding", target.rounds
    if device != "cpu":
        return "rounding", "a CUDA device chooses its algorithms by shape and layout"
    if reference.description.unlike:
        return "rounding", reference.description.unlike
    return "identical", ""


def rounds(record: Record) -> str:
    """Say what a conversion had to compute instead of copying, by its own record; nothing where it copied all.

    Args:
        record: what conversion.json says.
    """
    for fill in record.fills:
        if fill.rule.startswith(("norm of ", "sinusoids ")):
            return f"the conversion computed {fill.key} and rounded it: {fill.reason}"
    for edit in record.edits:
        if edit.rule == "add":
            return f"the conversion added {edit.value} to {edit.key} and rounded the sum; fairseq adds it to the logits"
    return ""


def _demand(one: Judged, device: str, dtype: str, require: str) -> list[Problem]:
    where = f"{device}, {dtype}, {one.probe.name}"
    if one.verdict == "different":
        return [Problem("different", where, str(one.telling))]
    if require == "identical" and one.verdict != "identical":
        return [Problem("not-identical", where, f"equal within rounding only, and identity is required; {one.telling}")]
    return []


def _half_precision(work: Work, reference: Reference, target: Target, device: str, findings: Findings) -> None:
    """Check float16 and bfloat16: rounded weights in float32, then the type itself, then against the unrounded model."""
    offered = reference.offered(work.probes, "")
    kept = [probe for probe in offered if probe.name != LONG and not probe.language]
    plain = {}
    for left, probe in zip(range(len(kept), 0, -1), kept, strict=True):
        work.tell(f"float32: {probe.name}, fairseq", left - 1)
        plain[probe.name] = _last(reference.run(probe, "float32"), target)
    if work.rounded:
        reference.round_weights(work.rounded)
    _runs(work, reference, target, device, f"float32 with {work.half} weights", "float32", findings)
    if not work.rounded and not isinstance(reference, Live):
        findings.skipped[f"{device}, {work.half}"] = "the reference computed in float32 only"
        return
    judged = _runs(replace(work, rounded=work.half), reference, target, device, work.half, work.half, findings)
    for one in judged:
        if one.probe.name in plain:
            _against_float32(work, device, one, plain[one.probe.name], findings)


def _against_float32(work: Work, device: str, judged: Judged, plain: Mapping[str, Stage], findings: Findings) -> None:
    """Compare with the unrounded model in float32; fairseq's own distance from it is what is allowed, and the floor."""
    probe, (stage,) = judged.probe, plain
    own = distances(judged.theirs, plain)[stage]
    found = distances(judged.ours, plain)[stage]
    floor = next((one.allowed for one in judged.differences if one.stage == stage), 0.0)
    difference = Difference(stage, found == 0.0, found, allowed=own + floor)
    findings.runs.append(
        {
            "device": device,
            "dtype": work.half,
            "input": f"{probe.name} against float32",
            "frames": list(judged.frames),
            "verdict": difference.verdict,
            "require": "rounding",
            "why": f"allowed is fairseq's own distance from float32 ({own:.1e}) and the floor ({floor:.1e})",
            "reference": "float32 as trained",
            "stage": stage if found else None,
            "first_stage": stage if found else None,
            "max_abs_difference": finite(found),
            "index": [],
            "allowed": own + floor,
            "float64_difference": None,
            "float64_allowed": None,
            "stages": [],
        }
    )
    if difference.verdict == "different":
        where = f"{device}, {work.half}, {probe.name} against float32"
        findings.problems.append(Problem("different", where, str(difference)))


def _last(answer: Answer, target: Target) -> dict[str, Stage]:
    """The last stage that both have: the target may be the encoder alone."""
    name = next((name for name in ("logits", SCORES) if name in answer.stages and name in target.stages), "encoder")
    return {name: answer.stages[name]}


def _end_to_end(work: Work, reference: Reference, target: Target, spell: Spell | None, findings: Findings) -> None:
    extractor = vocabulary.load_extractor(work.directory.path)
    if extractor.sampling_rate != work.subject.rate:
        detail = f"is {extractor.sampling_rate}, fairseq's task has {work.subject.rate}"
        findings.problems.append(Problem("sampling-rate", "preprocessor_config.json", detail))
        return
    sides = endtoend.Sides(work.subject, reference, target, extractor, spell, work.clips)
    exact = not reference.description.unlike and target.device == "cpu"
    exact = exact and not rounds(work.record) and not work.rounded and not target.rounds
    proved = all(run["verdict"] != "different" for run in findings.runs)
    for name, piece in work.pieces.items():
        work.tell(f"from waveform to text: {name}", 1)
        if isinstance(target, SpeechToTextTarget):
            found = generation.generate(sides, target, name, piece)
        else:
            found = [endtoend.run(sides, name, piece, exact=exact, proved=proved)]
        findings.end_to_end += found
        findings.problems += [Problem("end-to-end", one.input, one.why) for one in found if one.verdict == "different"]
    whole = work.pieces["speech"]
    if not isinstance(target, SpeechToTextTarget):
        shorter = replace(whole, samples=max(1, whole.samples // 2))
        findings.problems += endtoend.check_padding(sides, [whole, shorter])
        return
    if len(found) == 1 and work.subject.beam > 1:
        findings.skipped[f"beam {work.subject.beam}"] = "the recording holds no answers for it"
    findings.problems += generation.check_features(sides, whole)
    findings.skipped["filter banks"] = (
        "fairseq makes them with pykaldi or torchaudio; both sides were given the same, and their normalisation was compared"
    )
