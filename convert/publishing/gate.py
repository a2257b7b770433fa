"""The gate: only the bytes that the verification speaks of are published as verified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError, Problem
from convert.publishing.files import MODEL, Inventory

# Written after the verification, and read by no model.
AFTERWARDS = frozenset({"verification.json", "evaluation.json", "README.md"})


def check(inventory: Inventory) -> Mapping[str, Any]:
    """Return the verification of exactly these files, or refuse.

    Args:
        inventory: the model directory's files and their hashes now.

    Returns:
        The content of `verification.json`.

    Raises:
        ConvertError: with status 1 and every reason: no verification, not passed, a file changed, added or removed.
    """
    proof = inventory.json("verification.json")
    if not isinstance(proof, dict):
        raise ConvertError(
            "verification.json is missing: the model was not verified; nothing was sent",
            code="no-verification",
            key="verification.json",
            status=1,
            hint="fairseq-to-hf verify CHECKPOINT MODEL_DIR; or publish it as what it is, with --unverified",
        )
    problems = [*_verdict(proof), *_files(proof, inventory), *_source(proof, inventory.json("conversion.json"))]
    if problems:
        raise ConvertError(
            "the model directory is not what was verified; nothing was sent",
            code="gate",
            status=1,
            problems=problems,
            hint="fairseq-to-hf verify CHECKPOINT MODEL_DIR",
        )
    return proof


def _verdict(proof: Mapping[str, Any]) -> list[Problem]:
    name = "verification.json"
    if proof.get("schema") != 1:
        return [Problem("schema", name, f"schema: expected 1, found {proof.get('schema')}")]
    problems = []
    if proof.get("passed") is not True:
        problems.append(Problem("not-passed", name, "the verification did not pass"))
    runs = proof.get("runs") or []
    if not runs:
        problems.append(Problem("no-runs", name, "no run is recorded"))
    for run in runs:
        if run.get("verdict") not in ("identical", "rounding"):
            where = f"{run.get('device')}, {run.get('dtype')}, {run.get('input')}"
            problems.append(Problem("different", name, f"{where}: {run.get('verdict')}"))
    controls = proof.get("controls") or []
    if not controls:
        problems.append(Problem("no-controls", name, "no control is recorded: the check may have been blind"))
    for control in controls:
        if control.get("caught") is not True:
            problems.append(Problem("control", name, f"the control {control.get('name')} was not caught"))
    return problems


def _files(proof: Mapping[str, Any], inventory: Inventory) -> list[Problem]:
    verified: Mapping[str, str] = proof.get("files") or {}
    problems = []
    for name, sha256 in verified.items():
        if name in AFTERWARDS:
            continue
        if name not in inventory.files:
            problems.append(Problem("missing", name, "was verified and is not there now, or may not be published"))
        elif inventory.files[name].sha256 != sha256:
            found = inventory.files[name].sha256
            problems.append(Problem("changed", name, f"sha256 verified {sha256[:12]}…, now {found[:12]}…"))
    for name in inventory.files:
        if name not in verified and name not in AFTERWARDS and (MODEL.fullmatch(name) or name == "conversion.json"):
            problems.append(Problem("added", name, "was not there when the model was verified"))
    return problems


def _source(proof: Mapping[str, Any], conversion: Any) -> list[Problem]:
    if not isinstance(conversion, dict):
        return [Problem("missing", "conversion.json", "is not there: the directory does not say what it was made from")]
    made_from = (conversion.get("source") or {}).get("sha256")
    verified = (proof.get("checkpoint") or {}).get("sha256")
    if made_from != verified:
        detail = f"made from checkpoint {str(made_from)[:12]}…, verified against {str(verified)[:12]}…"
        return [Problem("checkpoint", "conversion.json", detail)]
    return []
