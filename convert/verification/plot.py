"""The picture of a verification: the difference at every stage against the floor, for the model and for the damaged copies."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.files import check_file, new_file
from convert.verification.report import Curve, Verification

BOTTOM = 1e-9  # where a difference of zero is drawn: a logarithmic scale has no zero
TOP = 1e4  # where one is drawn that is not finite


def check(path: Path) -> None:
    """Refuse, before the work begins, what could not be drawn at its end.

    Args:
        path: the picture that is wanted.

    Raises:
        ConvertError: status 2: `no-matplotlib`, or `usage`: its suffix is of no picture.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConvertError(f"{path.name}: .png, .svg or .pdf expected", code="usage", key="--plot")
    if find_spec("matplotlib") is None:
        raise ConvertError(
            "a picture needs matplotlib, which is not installed",
            code="no-matplotlib",
            key="--plot",
            hint="pip install 'fairseq-to-hf[plot]', or leave --plot out",
        )
    check_file(path, overwrite=True)


def plot(verification: Verification, path: str | Path) -> None:
    """Draw the greatest difference from fairseq at every stage: of the model, and of its deliberately damaged copies.

    Everything below the grey floor is rounding. A proof with teeth shows the model below it and every mistake rising out of
    it. Drawn is the input that the controls ran on, on the first device.

    Args:
        verification: what `verify` returned.
        path: the picture, .png, .svg or .pdf.

    Raises:
        ConvertError: as `check`; status 1, `no-curves`: the model did not load, so that nothing was computed.
    """
    path = Path(path)
    check(path)
    run = _run_to_draw(verification)
    from matplotlib.figure import Figure

    stages = [stage for stage, _, _ in run.rows]
    figure = Figure(figsize=(max(9.0, 0.36 * len(stages) + 4.5), 5.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _floor(axes, run)
    for number, control in enumerate(_controls(verification, run)):
        found = {stage: value for stage, value, _ in control.rows}
        heights = [_height(found.get(stage, 0.0)) for stage in stages]
        axes.plot(stages, heights, "-", color=f"C{number % 10}", linewidth=1.3, label=control.name)
    model = [_height(value) for _, value, _ in run.rows]
    axes.plot(stages, model, "o-", color="black", linewidth=2.2, markersize=5, label="the converted model", zorder=5)
    _dress(axes, stages, run, verification)
    with new_file(path, overwrite=True) as made:
        figure.savefig(made, metadata={"Software": None} if path.suffix.lower() == ".png" else None)


def _run_to_draw(verification: Verification) -> Curve:
    runs = [curve for curve in verification.stages if curve.kind == "run"]
    if not runs:
        raise ConvertError("there is nothing to draw: no output was computed", code="no-curves", key="--plot", status=1)
    return next((curve for curve in runs if curve.name == "speech-even"), runs[0])


def _controls(verification: Verification, run: Curve) -> list[Curve]:
    same = (run.device, run.dtype)
    return [curve for curve in verification.stages if curve.kind == "control" and (curve.device, curve.dtype) == same]


def _floor(axes: Any, run: Curve) -> None:
    floor = [_height(allowed) for _, _, allowed in run.rows]
    axes.fill_between(range(len(floor)), BOTTOM / 4, floor, color="0.87", label="rounding, as measured", zorder=0)


def _dress(axes: Any, stages: list[str], run: Curve, verification: Verification) -> None:
    axes.set_yscale("log")
    axes.set_ylim(bottom=BOTTOM / 4)
    axes.set_xlim(-0.4, len(stages) - 0.6)
    axes.set_xticks(range(len(stages)), stages, rotation=90)
    axes.set_ylabel("greatest absolute difference from fairseq")
    axes.annotate("the same bits", (0, BOTTOM), textcoords="offset points", xytext=(4, 7), fontsize=8, color="0.35")
    report = verification.report
    caught = sum(control["caught"] for control in report["controls"])
    verdict = "the same model" if verification.passed else "NOT proved to be the same model"
    first = f"{report['checkpoint']['name']}: {verdict}"
    second = f"{run.name}, {run.device}, {run.dtype}; {caught} of {len(report['controls'])} deliberate mistakes caught"
    axes.set_title(f"{first}\n{second}", fontsize=10, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _height(value: float) -> float:
    return max(min(value, TOP), BOTTOM) if value == value else TOP
