"""The runs: both sides on the same inputs, compared as the stages come; floors are measured where bits differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from convert.audio import Waveform
from convert.verification.compare import (
    CODES,
    GENERATED,
    QUANTIZED,
    SCORES,
    Answer,
    Difference,
    Stage,
    Verdict,
    compare,
    distances,
    exactly_allowed,
    first_different,
    with_floors,
    worst_of,
)
from convert.verification.fairseq_side.numerics import chunks
from convert.verification.fairseq_side.shelf import shelved
from convert.verification.inputs import Probe
from convert.verification.noise import UNIT, another_order
from convert.verification.reference import Reference, tensor
from convert.verification.target import Target

if TYPE_CHECKING:
    import torch

Tell = Callable[[str, int], object]


# what a model is there for, the first that it has
OUTCOMES = ("logits", SCORES, "project_hid", "encoder")


@dataclass(slots=True)
class Judged:
    """One input, judged.

    Args:
        probe: the input.
        differences: of every stage, in order.
        frames: the valid frames of each utterance.
        reference, target: what the two sides computed, kept where it is needed again.
        exact: what the reference computed in float64, kept likewise.
        theirs, ours: the outcomes of the two sides.
        layers: what the converted model's layers returned, kept likewise; see `Target.resumed`.
    """

    probe: Probe
    differences: list[Difference]
    frames: list[int]
    reference: Answer
    target: Answer = field(default_factory=lambda: Answer([]))
    exact: Answer = field(default_factory=lambda: Answer([]))
    theirs: Mapping[str, Stage] = field(default_factory=dict)
    ours: Mapping[str, Stage] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The worst stage's verdict."""
        return worst_of(difference.verdict for difference in self.differences)

    @property
    def telling(self) -> Difference | None:
        """The stage to tell of: the first beyond its floor, or else the last that is not identical."""
        if self.verdict == "different":
            return first_different(self.differences)
        return next((one for one in reversed(self.differences) if not one.equal), None)


def judge(
    reference: Reference,
    target: Target,
    clips: Mapping[str, Waveform],
    probes: Sequence[Probe],
    *,
    normalize: bool,
    arithmetic: str = "float32",
    measured: str = "",
    given: Judged | None = None,
    tell: Tell = lambda what, left: None,
) -> list[Judged]:
    """Run both sides on every input and compare them; measure floors where the bits differ.

    The numbers of a stage lie in a file while they are needed, so that no more of them than those of a stage or two is in
    memory at once.

    Args:
        reference, target: the two sides, on one device.
        clips: the waveforms by name.
        probes: the inputs.
        normalize: whether the inputs are normalised first.
        arithmetic: the type both sides compute in.
        measured: the probe whose floors are measured in any case, and whose numbers are kept.
        given: the result of the only input with another target, whose answers of the reference are used again.
        tell: called before each run of a side with what it is, and how many more are known to follow.

    Returns:
        One result for each input.
    """
    judged = []
    with reference.arithmetic(arithmetic), target.arithmetic(arithmetic):
        for left, probe in zip(range(len(probes), 0, -1), probes, strict=True):
            target.set_language(probe.language)
            tell(f"{probe.name}, fairseq", 2 * left - 1)
            answer = replace(given.reference) if given else reference.run(probe, arithmetic)
            tell(f"{probe.name}, transformers", 2 * left - 2)
            batch = batch_of(target, clips, probe, normalize, answer.frames)
            judged.append(_compared(target, answer, batch, probe, probe.name == measured))
    pending = [one for one in judged if one.verdict != "identical" or one.probe.name == measured]
    pending = [one for one in pending if all(not difference.note for difference in one.differences)]
    exact: list[Answer] = []
    found: list[_Measured] = []
    if pending:
        with reference.arithmetic("float64"):
            for left, one in zip(range(len(pending), 0, -1), pending, strict=True):
                if hasattr(reference, "last"):
                    reference.last = arithmetic
                tell(f"{one.probe.name}, fairseq in float64", left + 2 * len(pending) - 1)
                sure = replace(given.exact) if given else reference.run(one.probe, "float64")
                floors = reference.floors(one.probe, arithmetic, one.reference, sure)
                sure.stages = {name: sure.stages[name] for name in one.reference.stages if name in sure.stages}
                exact.append(sure)
                found.append(_Measured(floors))
        with target.arithmetic("float64"):
            for left, one, sure, numbers in zip(range(len(pending), 0, -1), pending, exact, found, strict=True):
                batch = batch_of(target, clips, one.probe, normalize, sure.frames)
                tell(f"{one.probe.name}, transformers twice in float64", 2 * left - 1)
                _measure(one, target, batch, sure, numbers)
                one.exact = sure if one.probe.name == measured else one.exact
    for one, sure, numbers, allowed in zip(
        pending, exact, found, exactly_allowed([numbers.noise for numbers in found]), strict=True
    ):
        one.differences = with_floors(one.differences, numbers.floors, numbers.apart, allowed, arithmetic)
        one.differences = [_tie(difference, one, sure) for difference in one.differences]
    target.set_language("")
    for one in judged:
        if one.probe.name != measured:
            one.reference, one.target = Answer([]), Answer([])
    return judged


def _compared(
    target: Target, answer: Answer, batch: tuple[torch.Tensor, list[int] | None], probe: Probe, keep: bool
) -> Judged:
    target.kept = {} if keep else None
    ours, differences = compared(target, answer, batch, keep)
    layers, target.kept = target.kept or {}, None
    outcomes = [{name: side.stages[name] for name in OUTCOMES if name in side.stages} for side in (answer, ours)]
    if not keep:  # what is the same on both sides is not needed again
        differing = {difference.stage for difference in differences if not difference.equal}
        if QUANTIZED in differing or CODES in differing:
            differing |= {CODES, QUANTIZED, "quantizer"}
        if GENERATED in differing:
            differing |= {SCORES, f"{GENERATED}.second", f"{GENERATED}.margin"}
        answer.stages = {name: stage for name, stage in answer.stages.items() if name in differing}
        ours.stages = {name: stage for name, stage in ours.stages.items() if name in differing}
    judged = Judged(probe, differences, ours.frames, answer, ours)
    (judged.theirs, judged.ours), judged.layers = outcomes, layers
    return judged


def batch_of(
    target: Target, clips: Mapping[str, Waveform], probe: Probe, normalize: bool, frames: list[int]
) -> tuple[torch.Tensor, list[int] | None]:
    """Make the converted model's input of a probe, and its lengths: those of the waveforms, or of the reference's frames."""
    waveforms, lengths = tensor(clips, probe, normalize)
    return waveforms, target.samples(frames) if probe.follows else lengths


def compared(
    target: Target, answer: Answer, batch: tuple[torch.Tensor, list[int] | None], keep: bool = False
) -> tuple[Answer, list[Difference]]:
    """Run the converted model and compare each stage as it comes.

    Args:
        target: the model.
        answer: the reference's.
        batch: the input, and the lengths of a padded one.
        keep: whether identical stages are kept too.

    Returns:
        The stages that are kept, and the differences in the model's order.
    """
    ours = Answer([])
    found: dict[str, Difference] = {}

    def visit(name: str, values: torch.Tensor) -> None:
        if name not in answer.stages:
            return
        found[name] = compare(name, answer.stages[name], values)
        if keep or not found[name].equal or name in (CODES, QUANTIZED, "quantizer", GENERATED, *OUTCOMES):
            ours.stages[name] = Stage(tuple(values.shape), shelved(values))

    ours.frames = target.run(*batch, visit)
    differences = [found[name] for name in answer.stages if name in found]
    for name in set(target.stages) - set(found):
        differences.append(Difference(name, False, float("inf"), note="one of the sides does not have this stage"))
    if ours.frames != answer.frames:
        note = f"{ours.frames} valid frames, the reference has {answer.frames}"
        differences.insert(0, Difference("frames", False, float("inf"), note=note))
    return ours, differences


@dataclass(slots=True)
class _Measured:
    """What is measured of one input, by stage.

    Args:
        floors: the distance of the reference from its own float64 run; then also that of the converted model.
        apart: the distance of the two float64 runs.
        noise: the distance of the converted model's float64 run from itself in another order, at least one unit of rounding.
    """

    floors: Mapping[str, float]
    apart: Mapping[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)


def _measure(
    one: Judged, target: Target, batch: tuple[torch.Tensor, list[int] | None], exact: Answer, numbers: _Measured
) -> None:
    """Run the converted model in float64, twice, and measure."""
    target.set_language(one.probe.language)
    ours: dict[str, Stage] = {}
    again: dict[str, Stage] = {}
    apart: dict[str, float] = {}

    def keep(name: str, values: torch.Tensor) -> None:
        if name in exact.stages:
            ours[name] = Stage(tuple(values.shape), shelved(values))

    def measure(name: str, values: torch.Tensor) -> None:
        stage = Stage(tuple(values.shape), values)
        if name in (CODES, QUANTIZED):
            again[name] = replace(stage, values=values.clone())
        elif name in ours:
            apart.update(distances({name: ours[name]}, {name: stage}))

    target.run(*batch, keep)
    with another_order():
        target.run(*batch, measure)
    mine = distances(one.target.stages, ours)
    numbers.floors = {name: value + mine.get(name, 0.0) for name, value in numbers.floors.items()}
    numbers.apart = distances(exact.stages, ours)
    for name, value in (apart | distances(ours, again)).items():
        greatest = max((float(piece.abs().max()) for piece in chunks(ours[name].values)), default=0.0)
        numbers.noise[name] = max(value, UNIT * greatest)
    if any(difference.stage == CODES and not difference.equal for difference in one.differences):
        restricted = distances(one.reference.stages, one.target.stages)
        one.differences = [
            replace(difference, greatest=restricted[QUANTIZED], equal=restricted[QUANTIZED] == 0.0, index=())
            if difference.stage == QUANTIZED
            else difference
            for difference in one.differences
        ]


def _tie(difference: Difference, one: Judged, exact: Answer) -> Difference:
    """Judge the quantizer's choices: two that differ must be as good as tied, within twice the floor of their scores."""
    if difference.stage == GENERATED and not difference.equal:
        return _second_choice(difference, one)
    if difference.stage != CODES or difference.equal:
        return difference
    theirs, ours = one.reference.stages[CODES].values, one.target.stages[CODES].values
    groups = theirs.shape[-1] if theirs.dim() > 1 else one.reference.stages[CODES].shape[-1]
    theirs, ours = theirs.reshape(-1, groups), ours.reshape(-1, groups).to(theirs.device)
    scores = exact.stages["quantizer"].values.reshape(len(theirs), groups, -1)
    best = scores.gather(-1, theirs[..., None].to(scores.device)) - scores.gather(-1, ours[..., None].to(scores.device))
    margin = float(best.abs().max())
    scoring = next(other for other in one.differences if other.stage == "quantizer")
    return replace(difference, greatest=margin, allowed=2 * scoring.allowed, exact=None, index=())


def _second_choice(difference: Difference, one: Judged) -> Difference:
    """Judge generated tokens: where two sides part, fairseq's second choice was the other's first, and as good as tied."""
    theirs, ours = one.reference.stages[GENERATED], one.target.stages[GENERATED]
    second, margin = (one.reference.stages[f"{GENERATED}.{name}"].values for name in ("second", "margin"))
    scoring = next(other for other in one.differences if other.stage == SCORES)
    greatest = 0.0
    for row, (a, b) in enumerate(
        zip(theirs.values.reshape(theirs.shape), ours.values.reshape(ours.shape), strict=True)
    ):
        parted = (a != b.to(a.device)).nonzero()
        if len(parted):
            at = int(parted[0])
            tied = int(b[at]) == int(second.reshape(theirs.shape)[row, at])
            greatest = max(greatest, float(margin.reshape(theirs.shape)[row, at]) if tied else float("inf"))
    return replace(difference, greatest=greatest, allowed=2 * scoring.allowed, exact=None, index=())
