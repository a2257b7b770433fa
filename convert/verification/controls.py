"""Negative controls: damaged copies of the model, its bytes, names and settings, which the checks must report."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.conversion import differences
from convert.errors import ConvertError, Problem
from convert.families import of_class
from convert.families.damages import Absent, Change, Configure, Damage, Damages, Exchange, Generate, SetLanguage
from convert.files import header_bytes, scratch_directory, write_file
from convert.reading import read_file
from convert.verification.compare import Difference, first_different
from convert.verification.judge import Judged, compared
from convert.verification.reference import Subject
from convert.verification.target import Target
from convert.verification.vocabulary import check_labels, check_tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Control:
    """One deliberate mistake, and whether it was seen.

    Args:
        name: what was done to the model.
        caught: whether the check said `different`.
        by: which check: `outputs` (`outputs, in float64` where float32 rounds the mistake away), `bytes`, `vocabulary`, `labels`, `files`.
        device: where it ran; empty for checks that compute nothing.
        stage, max_abs_difference, allowed: the first stage beyond its floor.
        curve: (stage, greatest difference, what is allowed there) along the model.
    """

    name: str
    caught: bool
    by: str
    device: str = ""
    stage: str = ""
    max_abs_difference: float | None = None
    allowed: float | None = None
    curve: tuple[tuple[str, float, float], ...] = ()


def on_outputs(
    target: Target,
    clip: Judged,
    batch: tuple[torch.Tensor, list[int] | None],
    device: str,
    others: Sequence[str] = (),
) -> tuple[list[Control], dict[str, str]]:
    """Damage copies of the model and run the same comparison.

    Args:
        target: the model; it is as before when this returns.
        clip: the undamaged model's result on one input, with its floors measured and its reference kept.
        batch: that input.
        device: the device's name, for the report.
        others: the languages that the clip was not judged in.

    Returns:
        The controls, and those that this model has no place for, with the reason.
    """
    floors = {difference.stage: difference for difference in clip.differences}
    controls, absent = [], {}
    damages = _damages(target, others)
    for name, damage in damages.items():
        if isinstance(damage, Absent):
            absent[name] = damage.reason
            continue
        with damaged(target, damage) as copy, copy.resumed(clip.layers, _changed(damage)):
            _, found = compared(copy, clip.reference, batch)
        judged = [_with_floor(difference, floors.get(difference.stage)) for difference in found]
        first = first_different(judged)
        caught = first is not None and first.verdict == "different"
        known = first if caught else None
        controls.append(
            Control(
                name,
                caught,
                "outputs",
                device,
                known.stage if known else "",
                _finite(known.greatest) if known else None,
                known.allowed if known else None,
                tuple((one.stage, one.greatest, one.allowed) for one in judged if one.stage in floors),
            )
        )
    return _in_float64(target, clip, batch, damages, controls), absent


def _changed(damage: Damage) -> tuple[str, ...]:
    """Name the tensors that a damage changes, if it changes nothing else."""
    if isinstance(damage, Exchange):
        return tuple(name for pair in damage.pairs for name in pair)
    return (damage.tensor,) if isinstance(damage, Change) else ()


def _in_float64(
    target: Target,
    clip: Judged,
    batch: tuple[torch.Tensor, list[int] | None],
    damages: Damages,
    controls: list[Control],
) -> list[Control]:
    """Judge the mistakes that float32's rounding hides as the model itself is judged: in float64 too."""
    if all(control.caught for control in controls):
        return controls
    allowed = {one.stage: one.exact_allowed for one in clip.differences if one.exact_allowed is not None}
    judged = []
    with target.arithmetic("float64"):
        for control in controls:
            if control.caught:
                judged.append(control)
                continue
            with damaged(target, damages[control.name]) as copy:
                _, found = compared(copy, clip.exact, batch)
            beyond = [one for one in found if one.stage in allowed and one.greatest > allowed[one.stage]]
            if beyond:
                first, by = beyond[0], f"{control.by}, in float64"
                found_there = _finite(first.greatest)
                control = replace(control, caught=True, by=by, stage=first.stage, allowed=allowed[first.stage])
                control = replace(control, max_abs_difference=found_there)
            judged.append(control)
    return judged


def _with_floor(difference: Difference, floor: Difference | None) -> Difference:
    if floor is None:
        return difference
    return replace(difference, allowed=floor.allowed)


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _damages(target: Target, others: Sequence[str]) -> Damages:
    """List the mistakes that fit a model: those of its family, and of its kind of head."""
    name = type(target.model).__name__
    family = of_class(name)
    if family is None:
        raise ConvertError(f"{name}: not a class that a conversion makes", code="load", key=name, status=1)
    made = dict(family.damages(target))
    for kind in family.kinds.values():
        made |= kind.damages(target)
    return made | {f"the adapters of {one}": SetLanguage(one) for one in others[:1]}


@contextlib.contextmanager
def damaged(target: Target, damage: Damage) -> Iterator[Target]:
    """Damage a model, or make a damaged copy of it; afterwards it is as before."""
    undo: Callable[[], object] = lambda: None  # noqa: E731
    if isinstance(damage, Configure):
        target = target.like(damage.values)
    elif isinstance(damage, Exchange):
        _exchange(target.weights, damage)
        undo = functools.partial(_exchange, target.weights, damage)
    elif isinstance(damage, Change):
        tensor = target.weights[damage.tensor]
        undo = functools.partial(tensor.copy_, tensor.clone())
        damage.how(tensor)
    elif isinstance(damage, Generate):
        config = target.model.generation_config
        undo = functools.partial(_set, config, {name: getattr(config, name) for name in damage.values})
        _set(config, damage.values)
    elif isinstance(damage, SetLanguage):
        target.set_language(damage.language)
        undo = functools.partial(target.set_language, "")
    try:
        yield target
    finally:
        undo()


def _set(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _exchange(weights: Mapping[str, torch.Tensor], damage: Exchange) -> None:
    for one, other in damage.pairs:
        kept = weights[one].clone()
        weights[one].copy_(weights[other])
        weights[other].copy_(kept)


def one_unit(model_dir: Path, name: str, compare_weights: Callable[[Path], list[Problem]]) -> Control:
    """Change one number of one tensor by one unit in the last place, and run the byte comparison.

    The damaged copy holds that tensor alone; the comparison has to name it as changed, and must not when it is unchanged.

    Args:
        model_dir: the model directory.
        name: the tensor.
        compare_weights: the byte comparison of a model directory.
    """
    from convert.directory import ModelDirectory

    directory = ModelDirectory(model_dir)
    data = bytearray(directory.read(name))
    changed = bytearray(data)
    changed[0] ^= 1  # numbers are little-endian: this is the last bit of the first number's fraction
    spec = directory.tensors[name].spec
    header = header_bytes([(name, spec.dtype, spec.shape)])

    def named(content: bytearray) -> bool:
        with scratch_directory() as copy:
            for file in ("config.json", "conversion.json"):
                write_file(copy / file, read_file(model_dir / file))
            write_file(copy / "model.safetensors", header + content)
            return any((problem.code, problem.key) == ("bytes", name) for problem in compare_weights(copy))

    return Control("one number off by one unit in the last place", named(changed) and not named(data), "bytes")


def blank_and_pad(tokens: list[str], subject: Subject) -> Control:
    """Exchange the names of the blank and of fairseq's padding, and run the vocabulary's comparison."""
    wrong = list(tokens)
    one = max(subject.blank, 0)  # without a blank, what is as easily confused: `<s>` and `<pad>`
    other = 1 if one == 0 else 0
    wrong[one], wrong[other] = wrong[other], wrong[one]
    name = "blank and pad exchanged" if subject.blank >= 0 else "<s> and <pad> exchanged"
    return Control(name, bool(check_tokens(wrong, subject)), "vocabulary")


def exchanged_labels(labels: list[str], subject: Subject, spelling: str) -> Control:
    """Exchange the names of the first and the last class, and run the labels' comparison."""
    wrong = [labels[-1], *labels[1:-1], labels[0]]
    return Control("two labels exchanged", bool(check_labels(wrong, subject, spelling)), "labels")


def wrong_setting(meant: Mapping[str, Any]) -> Control:
    """Change one value of config.json that no output shows, and run the files' comparison."""
    part = meant.get("encoder", meant)
    name = next(name for name in ("layerdrop", "decoder_layerdrop") if name in part)
    damaged = {name: float(part[name]) + 0.25}
    changed = dict(meant) | ({"encoder": meant["encoder"] | damaged} if "encoder" in meant else damaged)
    found = [*differences("config.json", meant, changed)]
    clean = [*differences("config.json", meant, dict(meant))]
    return Control("a setting of training changed in config.json", bool(found) and not clean, "files")


def missing(controls: list[Control]) -> list[Problem]:
    """List the controls that were not caught."""
    return [
        Problem(
            "blind",
            control.name,
            f"this deliberate mistake was not caught by the {control.by}: the check cannot see it",
        )
        for control in controls
        if not control.caught
    ]
