"""The report of a verification: what `verify` returns, `verification.json`, and the table on the terminal.

`verification.json` (schema 1) holds nothing that changes from run to run: no date, duration, path or user. Its fields stand
in docs/verification.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.errors import Problem
from convert.files import write_file
from convert.report import json_bytes, library, padding_text, problem_lines, shown
from convert.verification.compare import SCORES
from convert.verification.controls import Control
from convert.verification.endtoend import EndToEnd
from convert.verification.judge import Judged

NAME = "verification.json"
OF_WEIGHTS = ("bytes", "shape", "missing-tensor", "unexpected-tensor")  # codes of `convert.compare_weights`
OF_OUTPUTS = ("different", "not-identical", "end-to-end")
EFFECTS = ("changed-file", *OF_OUTPUTS)  # what follows from any other problem
Row = tuple[str, float, float]
# the words of the table
_MEANINGS = {
    "identical": "every bit is the same",
    "rounding": "within the floor, what rounding to float32 makes here, as measured; the same in float64",
    "explained": "normalised or rounded otherwise before the model, which computes the same on equal inputs",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """The differences along the stages, of one run or of one control.

    Args:
        kind: `run` or `control`.
        device, dtype: where and in which type.
        name: the input, or what the control did to the model.
        rows: (stage, greatest absolute difference, what is allowed there), in the model's order.
    """

    kind: str
    device: str
    dtype: str
    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found.

    Args:
        passed: whether the model was proved to be the same, and every deliberate mistake was caught.
        report: the content of `verification.json`.
        problems: why it did not pass.
        stages: the differences along the stages, of every run and every control.
    """

    passed: bool
    report: dict[str, Any]
    problems: tuple[Problem, ...] = ()
    stages: tuple[Curve, ...] = ()

    def __str__(self) -> str:
        """Write the table that a person reads in ten seconds."""
        return text(self.report)


@dataclass(slots=True)
class Findings:
    """What a verification has found so far."""

    problems: list[Problem] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    end_to_end: list[EndToEnd] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    padding: list[dict[str, Any]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def finish(self, **facts: Any) -> Verification:
        """Close the list and write the report.

        Args:
            facts: `files`, `checkpoint`, `tensors`, `reference`, `environment` and `missing` of the report.
        """
        problems = tuple(sorted(set(self.problems)))
        weights = [str(problem) for problem in problems if problem.code in OF_WEIGHTS]
        kept = [{key: value for key, value in asdict(one).items() if key != "curve"} for one in self.controls]
        report = {
            "schema": 1,
            "passed": not problems,
            "problems": [asdict(problem) for problem in problems],
            "files": facts["files"],
            "checkpoint": facts["checkpoint"],
            "reference": facts["reference"],
            "environment": facts["environment"],
            "weights": {"tensors": facts["tensors"], "problems": weights},
            "runs": self.runs,
            "end_to_end": [asdict(one) for one in self.end_to_end],
            "controls": kept,
            "controls_without_place": self.absent,
            "missing": facts["missing"],
            "skipped": self.skipped,
            "padding": self.padding,
        }
        return Verification(not problems, report, problems, tuple(self.curves))


def run_of(judged: Judged, device: str, dtype: str, require: str, why: str) -> dict[str, Any]:
    """Put the result of one input into the report's words."""
    probe, telling = judged.probe, judged.telling
    unlike = [one for one in judged.differences if not one.equal]
    return {
        "device": device,
        "dtype": dtype,
        "input": probe.name,
        "frames": list(judged.frames),
        "verdict": judged.verdict,
        "require": require,
        "why": why,
        "reference": "as built" if probe.multiple is None else f"required_seq_len_multiple={probe.multiple}",
        "stage": telling.stage if telling else None,
        "first_stage": unlike[0].stage if unlike else None,
        "max_abs_difference": finite(telling.greatest) if telling else 0.0,
        "index": list(telling.index) if telling else [],
        "allowed": telling.allowed if telling else 0.0,
        "float64_difference": finite(telling.exact) if telling and telling.exact is not None else None,
        "float64_allowed": telling.exact_allowed if telling else None,
        "stages": [
            {"stage": one.stage, "max_abs_difference": finite(one.greatest), "allowed": one.allowed} for one in unlike
        ],
    }


def finite(value: float) -> float | None:
    """Return a number that JSON can hold, `None` for one that is not finite."""
    return value if value == value and abs(value) < float("inf") else None


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `verification.json` into a model directory: all of it, or nothing, and no path of this machine."""
    machine = (folder.absolute().parent, folder.resolve().parent, Path.home(), Path.cwd(), Path(tempfile.gettempdir()))
    places = sorted({f"{place}/" for place in machine if place != Path("/")}, key=len, reverse=True)
    write_file(folder / NAME, json_bytes(_without(report, places)))


def _without(value: Any, places: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {_without(key, places): _without(item, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(item, places) for item in value]
    for place in places if isinstance(value, str) else ():
        value = value.replace(place, "")
    return value


def text(report: Mapping[str, Any]) -> str:
    """Write the table on the terminal."""
    reference = report["reference"]
    lines = [
        f"{library(reference['fairseq'])} ({reference['kind']}), transformers {report['environment']['transformers']}"
    ]
    lines.append(f"  {'weights':<22}{_weights(report['weights'])}")
    runs = report["runs"]
    for device, dtype in dict.fromkeys((run["device"], run["dtype"]) for run in runs):
        lines.append(f"  {device}, {dtype}")
        group = [run for run in runs if (run["device"], run["dtype"]) == (device, dtype)]
        width = max(19, *(len(run["input"]) for run in group)) + 1
        lines += [_line(run, width) for run in group]
    lines += ["  waveform to text", *map(_waveform, report["end_to_end"])] if report["end_to_end"] else []
    caught = sum(control["caught"] for control in report["controls"])
    lines.append(f"  {'deliberate mistakes':<22}{caught} of {len(report['controls'])} caught")
    lines += [f"  {name}: not on this machine, not verified there" for name in report["missing"]]
    lines += [f"  not checked: {key}: {reason}" for key, reason in report["skipped"].items()]
    lines += [f"  {padding_text(one)}" for one in report["padding"]]
    verdicts = {one["verdict"] for one in (*runs, *report["end_to_end"])}
    lines += [f"  {word:<12}{meaning}" for word, meaning in _MEANINGS.items() if word in verdicts]
    lines.append("verified: the same model" if report["passed"] else "NOT the same, or not proved:")
    lines += [f"  {line}" for line in problem_lines(_reasons(report))]
    return "\n".join(map(shown, lines))


def _reasons(report: Mapping[str, Any]) -> list[Problem]:
    """List what is wrong, causes before effects; of the inputs that the table has already, one for each device and type."""
    groups: dict[tuple[str, ...], list[Problem]] = {}
    for problem in (Problem(**problem) for problem in report["problems"]):
        where = (problem.key.rpartition(", ")[0],) if problem.code in OF_OUTPUTS else (problem.key, problem.detail)
        groups.setdefault((problem.code, *where), []).append(problem)
    reasons = [
        replace(first, detail=f"{first.detail}; and {len(others)} more of these inputs") if others else first
        for first, *others in groups.values()
    ]
    return sorted(reasons, key=lambda problem: EFFECTS.index(problem.code) if problem.code in EFFECTS else -1)


def _weights(weights: Mapping[str, Any]) -> str:
    count, wrong = weights["tensors"], len(weights["problems"])
    return f"{wrong} of {count} tensors differ" if wrong else f"{count} tensors, every byte the same"


def _line(run: Mapping[str, Any], width: int) -> str:
    line = f"    {run['input']:<{width}}{run['verdict']:<11}"
    if run["verdict"] == "identical":
        return line.rstrip()
    if run["max_abs_difference"] is None:
        return f"{line}{run['stage']}: not a number, or not the same shape"
    return f"{line}{run['stage']}: {run['max_abs_difference']:.1e}, floor {run['allowed']:.1e}"


def _waveform(one: Mapping[str, Any]) -> str:
    line = f"    {one['input']:<20}{one['verdict']:<11}"
    if one["verdict"] == "different":
        return f"{line}{one['why']}"
    if one["max_abs_difference"]:
        level = one["hf_std"] / max(one["fairseq_std"], 1e-30)
        line += f"{one['stage']} {one['max_abs_difference']:.1e}, input level {level:.4f}  "
    if one["same_path"] is not None:
        line += f"{one['same_path']:.1%} of {'tokens' if one['stage'] == SCORES else 'frames'}, "
    if one["hf_text"] is not None:
        other = f"OTHER TEXT: {one['why']}" if one["stage"] == SCORES and one["why"] else "OTHER TEXT"
        line += "same text" if one["fairseq_text"] == one["hf_text"] else other
    return line.rstrip()


def curves_of(judged: Sequence[Judged], controls: Sequence[Control], device: str, dtype: str) -> list[Curve]:
    """Keep the differences along the stages, for a picture."""
    made = [
        Curve("run", device, dtype, one.probe.name, tuple((d.stage, d.greatest, d.allowed) for d in one.differences))
        for one in judged
    ]
    return made + [Curve("control", device, dtype, one.name, one.curve) for one in controls if one.curve]
