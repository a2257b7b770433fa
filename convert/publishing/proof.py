"""The card's proof: what the verification compared, on which devices, and how close it was."""

from __future__ import annotations

from collections.abc import Sequence

from convert.conversion import Record
from convert.publishing.facts import Facts
from convert.publishing.text import code, text
from convert.publishing.verified import Run, Verified
from convert.report import library


def proof(facts: Facts) -> str:
    """Write the verification's table, its controls and its surroundings."""
    if facts.verification is None:
        return "None: nobody has shown that this model computes what its source computes."
    runs = facts.verification.runs
    lines = [
        "Every tensor was read back from the written file and is byte for byte the checkpoint's"
        f"{_dtype(facts.record)}{_edits(facts.record)}. fairseq's own code and transformers then computed the same inputs:",
        table(_summary(runs)),
        _on_trust(facts.verification),
        _sentence(facts.verification),
        f"<details><summary>All {len(runs)} runs</summary>\n\n{table(_all(runs))}\n\n</details>",
    ]
    return "\n\n".join(line for line in lines if line)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows of Markdown, the first of them the head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))


def _dtype(record: Record) -> str:
    return "" if record.dtype == "keep" else f" rounded to {record.dtype}"


def _edits(record: Record) -> str:
    return ", except for what is listed as changed above" if record.edits else ""


def _summary(runs: Sequence[Run]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.device, run.dtype), []).append(run)
    rows = [["device", "dtype", "inputs", "bit-identical", "within rounding", "greatest difference", "its floor"]]
    for (device, dtype), group in groups.items():
        same = sum(run.verdict == "identical" for run in group)
        worst = max(group, key=lambda run: run.max_abs_difference or 0.0)
        rows.append([text(device), text(dtype), str(len(group)), str(same), str(len(group) - same), *_numbers(worst)])
    return rows


def _all(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["device", "dtype", "input", "verdict", "greatest difference", "its floor"]]
    return rows + [[*map(text, (run.device, run.dtype, run.input, run.verdict)), *_numbers(run)] for run in runs]


def _numbers(run: Run) -> tuple[str, str]:
    difference = run.max_abs_difference or 0.0
    return (f"{difference:.1e}", f"{run.allowed or 0.0:.1e}") if difference else ("0", "")


def _on_trust(proof: Verified) -> str:
    lines = [f"- {name}: {text(proof.skipped[name])}" for name in ("settings", "dictionary") if name in proof.skipped]
    return "\n".join(["Taken on trust, not proved:", "", *lines]) if lines else ""


def _sentence(proof: Verified) -> str:
    caught = sum(control.caught for control in proof.controls)
    names = ", ".join(text(name) for name in dict.fromkeys(control.name for control in proof.controls))
    versions = [library(proof.reference.fairseq)] if proof.reference.fairseq else []
    for key in ("python", "torch", "transformers", "cuda"):
        value = proof.environment.get(key)
        versions += [f"{key} {value}"] if isinstance(value, str) and value else []
    sentence = (
        f"Deliberate mistakes that the same check had to catch: {caught} of {len(proof.controls)} caught ({names})."
    )
    sentence += f"\n\nMade with {', '.join(map(text, versions))}." if versions else ""
    sha256 = code(proof.checkpoint.sha256)
    return f"{sentence} `verification.json` holds the sha256 of all {len(proof.files)} files and of the checkpoint ({sha256})."
