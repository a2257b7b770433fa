"""The card's proof: what the verification compared, on which devices, and how close it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convert.publishing.facts import Facts


def proof(facts: Facts) -> str:
    """Write the verification's table, its controls and its surroundings."""
    if facts.verification is None:
        return "There is none: nobody has shown that this model computes what its source computes."
    runs: Sequence[Mapping[str, Any]] = facts.verification.get("runs") or ()
    lines = [
        "Every tensor was read back from the written file and is byte for byte the checkpoint's"
        f"{_dtype(facts.conversion)}{_edits(facts.conversion)}. fairseq's own code and transformers then computed the same inputs:",
        _table(_summary(runs)),
        _sentence(facts),
        f"<details><summary>All {len(runs)} runs</summary>\n\n{_table(_all(runs))}\n\n</details>",
    ]
    return "\n\n".join(line for line in lines if line)


def _dtype(conversion: Mapping[str, Any]) -> str:
    dtype = conversion.get("dtype", "keep")
    return "" if dtype == "keep" else f" rounded to {dtype}"


def _edits(conversion: Mapping[str, Any]) -> str:
    return ", but for what stands as changed above" if conversion.get("edits") else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _summary(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((str(run.get("device")), str(run.get("dtype"))), []).append(run)
    rows = [["device", "dtype", "inputs", "bit-identical", "within rounding", "greatest difference", "its floor"]]
    for (device, dtype), group in groups.items():
        same = sum(run.get("verdict") == "identical" for run in group)
        worst = max(group, key=lambda run: _number(run.get("max_abs_difference")))
        difference = _number(worst.get("max_abs_difference"))
        floor = f"{_number(worst.get('allowed')):.1e}" if difference else ""
        text = f"{difference:.1e}" if difference else "0"
        rows.append([device, dtype, str(len(group)), str(same), str(len(group) - same), text, floor])
    return rows


def _all(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["device", "dtype", "input", "verdict", "greatest difference", "its floor"]]
    for run in runs:
        difference = _number(run.get("max_abs_difference"))
        floor = f"{_number(run.get('allowed')):.1e}" if difference else ""
        cells = [str(run.get(key)) for key in ("device", "dtype", "input", "verdict")]
        rows.append([*cells, f"{difference:.1e}" if difference else "0", floor])
    return rows


def _sentence(facts: Facts) -> str:
    proof = facts.verification or {}
    controls = proof.get("controls") or ()
    caught = sum(control.get("caught") is True for control in controls)
    names = ", ".join(dict.fromkeys(str(control.get("name")) for control in controls))
    reference = proof.get("reference") or {}
    versions = [f"fairseq {reference['fairseq']}"] if reference.get("fairseq") else []
    versions += [f"{key} {value}" for key, value in (proof.get("environment") or {}).items() if _version(key, value)]
    text = f"Deliberate mistakes that the same check had to catch: {caught} of {len(controls)} caught ({names})."
    checkpoint = (proof.get("checkpoint") or {}).get("sha256")
    files = len(proof.get("files") or ())
    text += f"\n\nMade with {', '.join(versions)}." if versions else ""
    return f"{text} `verification.json` holds the sha256 of all {files} files and of the checkpoint (`{checkpoint}`)."


def _version(key: str, value: Any) -> bool:
    return key in ("python", "torch", "transformers", "cuda") and isinstance(value, str) and bool(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
