"""The gate: only the bytes that the verification names are published as verified."""

from __future__ import annotations

from convert.conversion import NAME as CONVERSION
from convert.errors import ConvertError, Problem
from convert.publishing.files import MODEL, Inventory
from convert.publishing.verified import VERIFICATION, Verified
from convert.report import quoted

# Written after the verification, and read by no model.
AFTERWARDS = frozenset({"verification.json", "evaluation.json", "README.md"})


def check(inventory: Inventory) -> Verified:
    """Return the verification of exactly these files, or refuse.

    Args:
        inventory: the model directory's files and their hashes now.

    Returns:
        What `verification.json` says.

    Raises:
        ConvertError: with status 1 and every reason: no verification, not passed, a file changed, added or removed.
    """
    value, remedy = inventory.json(VERIFICATION), f"fairseq-to-hf verify CHECKPOINT {quoted(inventory.directory)}"
    if value is None:
        raise ConvertError(
            "verification.json is missing: the model was not verified; nothing was sent",
            code="no-verification",
            key="verification.json",
            status=1,
            hint=f"{remedy}; or publish it as unverified: --unverified",
        )
    proof = Verified.of(value)
    problems = [*_verdict(proof), *_files(proof, inventory), *_source(proof, inventory)]
    if problems:
        raise ConvertError(
            "the model directory is not what was verified; nothing was sent",
            code="gate",
            status=1,
            problems=problems,
            hint=remedy,
        )
    return proof


def _verdict(proof: Verified) -> list[Problem]:
    if proof.schema != 1:
        return [Problem("schema", VERIFICATION, f"schema: expected 1, found {proof.schema}")]
    problems = [] if proof.passed else [Problem("not-passed", VERIFICATION, "the verification did not pass")]
    problems += [] if proof.runs else [Problem("no-runs", VERIFICATION, "no run is recorded")]
    for run in proof.runs:
        if run.verdict not in ("identical", "rounding"):
            where = f"{run.device}, {run.dtype}, {run.input}"
            problems.append(Problem("different", VERIFICATION, f"{where}: {run.verdict}"))
    if not proof.controls:
        detail = "no control is recorded, so nothing shows that the checks can fail"
        problems.append(Problem("no-controls", VERIFICATION, detail))
    for control in proof.controls:
        if not control.caught:
            problems.append(Problem("control", VERIFICATION, f"the control {control.name} was not caught"))
    return problems


def _files(proof: Verified, inventory: Inventory) -> list[Problem]:
    problems = []
    for name, sha256 in proof.files.items():
        if name in AFTERWARDS:
            continue
        if name not in inventory.files:
            problems.append(Problem("missing", name, "was verified, and is missing now or may not be published"))
        elif inventory.files[name].sha256 != sha256:
            found = inventory.files[name].sha256
            problems.append(Problem("changed", name, f"sha256 verified {sha256[:12]}…, now {found[:12]}…"))
    for name in inventory.files:
        if name not in proof.files and name not in AFTERWARDS and (MODEL.fullmatch(name) or name == CONVERSION):
            problems.append(Problem("added", name, "was not there when the model was verified"))
    return problems


def _source(proof: Verified, inventory: Inventory) -> list[Problem]:
    if CONVERSION not in inventory.files:
        return [Problem("missing", CONVERSION, "is not there: the directory does not say what it was made from")]
    made_from, verified = inventory.record().source.sha256, proof.checkpoint.sha256
    if made_from != verified:
        detail = f"made from checkpoint {made_from[:12]}…, verified against {verified[:12]}…"
        return [Problem("checkpoint", CONVERSION, detail)]
    return []
