"""The comparison of two answers: stage by stage, against a measured floor, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Verdict = Literal["identical", "rounding", "different"]
ORDER: tuple[Verdict, ...] = ("identical", "rounding", "different")
MARGIN = 16.0  # between float64's measured rounding and what is a mistake: see docs/verification.md
CODES = "codes"  # the quantizer's choice: whole numbers, for which there is no rounding
QUANTIZED = "project_q"  # depends on the choice alone
GENERATED = "generated"  # the decoder's choices: tokens, likewise whole numbers
SCORES = "decoder.logits"  # what they are chosen by


@dataclass(slots=True)
class Stage:
    """One side's numbers at one stage.

    Args:
        shape: of the whole stage.
        values: all of its numbers, or when `step` is above 1, every `step`-th of them, flat.
        step: see `values`.
        sha256: of the whole stage, when `values` is a sample.
    """

    shape: tuple[int, ...]
    values: torch.Tensor
    step: int = 1
    sha256: str = ""


@dataclass(slots=True)
class Answer:
    """What one side computed for one input.

    Args:
        frames: the valid frames of each utterance.
        stages: the stages in order.
        beams: what a decoder wrote with the recipe's beam, tokens and text, for each utterance; empty where it was not asked.
    """

    frames: list[int]
    stages: dict[str, Stage] = field(default_factory=dict)
    beams: list[tuple[list[int], str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Difference:
    """How two sides differ at one stage.

    Args:
        stage: the name, such as `layer.3`.
        equal: whether all numbers are the same, and finite.
        greatest: the greatest absolute difference; infinite where a number is not finite or the shapes differ.
        index: where that is.
        allowed: the measured floor; 0 before it is measured.
        exact: the greatest difference when both sides compute in float64.
        exact_allowed: what float64's own rounding can make, measured, with a margin.
        note: what else there is to say, such as differing shapes.
    """

    stage: str
    equal: bool
    greatest: float
    index: tuple[int, ...] = ()
    allowed: float = 0.0
    exact: float | None = None
    exact_allowed: float | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """The verdict on this stage alone."""
        if self.exact is not None and self.exact > (self.exact_allowed or 0.0):
            return "different"  # even where float32 rounds the mistake away
        if self.equal:
            return "identical"
        return "rounding" if self.greatest <= self.allowed else "different"

    def __str__(self) -> str:
        """Write it as `layer.3: greatest absolute difference 4.8e-03 at (17, 4), allowed 5.4e-06`."""
        if self.note:
            return f"{self.stage}: {self.note}"
        text = f"{self.stage}: greatest absolute difference {self.greatest:.1e}"
        text += f" at ({', '.join(map(str, self.index))})" if self.index else ""
        text += f", allowed {self.allowed:.1e}"
        if self.exact is not None and self.exact > (self.exact_allowed or 0.0):
            text += f"; in float64 {self.exact:.1e}, allowed {self.exact_allowed or 0.0:.1e}"
        return text


def compare(name: str, reference: Stage, values: torch.Tensor) -> Difference:
    """Compare one stage of the converted model with the reference's.

    Numbers that are not finite are equal to nothing, on both sides alike: a model that answers NaN proves nothing.

    Args:
        name: the stage.
        reference: the reference's numbers.
        values: the converted model's, all of them.
    """
    import torch

    from convert.verification.fairseq_side.numerics import digest, finite, greatest

    if tuple(values.shape) != reference.shape:
        note = f"shape {tuple(values.shape)}, the reference has {reference.shape}"
        return Difference(name, False, float("inf"), note=note)
    theirs = reference.values.to(values.device)
    if reference.step > 1:
        mine, same = values.reshape(-1)[:: reference.step], digest(values) == reference.sha256
    else:
        mine = values.reshape(theirs.shape)
        same = torch.equal(mine, theirs)
    if not finite(values) or not (same or finite(theirs)):
        return Difference(name, False, float("inf"), note="not all numbers are finite")
    if same:
        return Difference(name, True, 0.0)
    worst, at = greatest(mine, theirs)
    return Difference(name, False, worst, _unravel(at * reference.step, reference.shape))


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for length in reversed(shape):
        flat, at = divmod(flat, length)
        index.insert(0, at)
    return tuple(index)


def with_floors(
    differences: Iterable[Difference],
    floors: Mapping[str, float],
    exact: Mapping[str, float],
    exact_allowed: Mapping[str, float],
    arithmetic: str,
) -> list[Difference]:
    """Add what is allowed, as it was measured.

    The two sides' distances from their own float64 runs, and that between those, bound what rounding can make of two models
    that are the same. That alone would let a small mistake hide beneath it; so the float64 runs are judged too, where the same
    mistake stands out. Half types are not compared in float64 once more: their rounded weights were, when they were judged in
    float32.

    Args:
        differences: of the stages.
        floors: the sum of both sides' greatest distances from their own float64 runs, by stage.
        exact: the greatest difference between the two float64 runs, by stage.
        exact_allowed: what is allowed there.
        arithmetic: the type of the runs that are judged.
    """
    judged = []
    for difference in differences:
        name = difference.stage
        allowed = floors.get(name, 0.0) + exact_allowed.get(name, 0.0)
        judged.append(
            replace(
                difference,
                allowed=allowed,
                exact=exact.get(name) if arithmetic == "float32" else None,
                exact_allowed=exact_allowed.get(name),
            )
        )
    return judged


def exactly_allowed(noises: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Say how far two float64 runs of one model may be from each other, for each input and stage.

    That is `MARGIN` times the distance of the converted model from itself in float64 with its sums in another order. Measured
    on few numbers a distance can be small by chance: no input is allowed less than the middle one of all inputs.

    Args:
        noises: that distance, by stage, of each input.
    """
    middle = {}
    for name in {name for noise in noises for name in noise}:
        found = sorted(noise[name] for noise in noises if name in noise)
        middle[name] = found[len(found) // 2]
    return [{name: MARGIN * max(value, middle[name]) for name, value in noise.items()} for noise in noises]


def distances(one: Mapping[str, Stage], other: Mapping[str, Stage]) -> dict[str, float]:
    """Measure the greatest absolute difference of every stage of two runs of one side, or of two sides in float64.

    Where the quantizer chose differently (a tie, or nearly), what depends on the choice alone is not compared.

    Args:
        one, other: the stages; where one of them is a sample, the other is sampled alike.
    """
    from convert.verification.fairseq_side.numerics import distance

    same = None
    if CODES in one and CODES in other:
        first, second = (stages[CODES].values.reshape(stages[CODES].shape) for stages in (one, other))
        same = (first == second.to(first.device)).all(-1)
    measured = {}
    for name, stage in one.items():
        if name == CODES or name.startswith(GENERATED) or name not in other:
            continue
        a, b = aligned(stage, other[name])
        b = b.to(a.device)
        if name == QUANTIZED and same is not None:
            a, b = a.reshape(stage.shape)[same.to(a.device)], b.reshape(stage.shape)[same.to(a.device)]
        measured[name] = distance(a, b)
    return measured


def aligned(one: Stage, other: Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the same numbers of two stages, flat."""
    a, b = one.values.reshape(-1), other.values.reshape(-1)
    if one.step != other.step:
        a, b = (a, b[:: one.step]) if one.step > 1 else (a[:: other.step], b)
    return a, b


def worst_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst verdict.

    Example:
        >>> worst_of(["identical", "rounding"])
        'rounding'
    """
    return max(verdicts, key=ORDER.index, default="identical")


def first_different(differences: Iterable[Difference]) -> Difference | None:
    """Return the first stage that is not identical and, if there is one, rather the first that is beyond its floor.

    Where numbers are not finite or shapes differ, no floor is measured: then it is the first such stage.
    """
    listed = list(differences)
    for difference in listed:
        if difference.note:
            return difference
    for verdict in ("different", "rounding"):
        for difference in listed:
            if difference.verdict == verdict:
                return difference
    return None
