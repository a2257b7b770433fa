"""`fairseq-to-hf plan`."""

from __future__ import annotations

from typing import Any

from convert.cli import Outcome
from convert.cli import command as make
from convert.commands.options import planning, source
from convert.families import Conversion
from convert.package import plan
from convert.report import fold


@make(
    "plan",
    "fairseq-to-hf plan checkpoint_best.pt",
    "fairseq-to-hf plan checkpoint_best.pt --head encoder",
    "fairseq-to-hf plan --json checkpoint_best.pt",
)
@source
@planning()
def command(checkpoint: str, **asked: Any) -> Outcome:
    """Show what a conversion would do, or why it is refused.

    Lists every tensor that is renamed, dropped or filled, every value of config.json with its origin, and the settings that
    do not change what the model computes. Exit status 1 when the checkpoint cannot be converted completely.
    """
    model = plan(checkpoint, **asked)
    return Outcome(True, describe(model), as_data(model))


def as_data(model: Conversion) -> dict[str, Any]:
    """Return a plan as plain data."""
    return {
        "architecture": {"fairseq": model.fairseq, "class": model.target, "head": model.head},
        "table": {"name": model.plan.table.name, "digest": model.plan.table.digest},
        "renames": dict(model.plan.renames),
        "drops": [drop.record for drop in model.dropped],
        "fills": [fill.record for fill in model.plan.fills],
        "edits": [edit.record for edit in model.plan.table.edits],
        "config": {value.name: {"value": value.value, "origin": value.origin} for value in model.config},
        "training_only": dict(model.training_only),
        "notes": list(model.notes),
        "language": model.language,
        "languages": sorted(model.languages),
        "files": sorted(
            [
                *model.processor.files,
                *(sidecar.file for sidecar in model.sidecars),
                *("config.json", "conversion.json", "model.safetensors"),
            ]
        ),
    }


def describe(model: Conversion) -> list[str]:
    """Write a plan for people."""
    lines = [
        f"{model.fairseq} becomes {model.target}",
        *model.chosen,
        *(f"note: {note}" for note in model.notes),
        "",
        f"tensors renamed: {len(model.plan.renames)}",
    ]
    pairs = [f"{source} -> {target}" for source, target in model.plan.renames.items()]
    lines += [f"  {line}" for line in fold(pairs)]
    lines += [f"dropped: {len(model.dropped)}", *(f"  {drop.source}: {drop.reason}" for drop in model.dropped)]
    lines += [f"filled: {len(model.plan.fills)}"]
    lines += [f"  {fill.target}: {fill.what} ({fill.reason})" for fill in model.plan.fills]
    lines += [f"  {e.target}[{e.row}]: {e.what.rule} {e.what.value} ({e.reason})" for e in model.plan.table.edits]
    lines += model.kept
    lines += ["config.json", *(f"  {v.name} = {v.value!r}  ({v.origin})" for v in model.config)]
    lines += ["settings that act in training only, or have no effect in this model"]
    lines += [f"  {', '.join(model.training_only) or 'none'}"]
    return lines
