"""`fairseq-to-hf fetch`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from convert.cli import Outcome
from convert.cli import command as make
from convert.errors import ConvertError
from convert.fetching import catalogue, fetch
from convert.report import size


@make(
    "fetch",
    "fairseq-to-hf fetch --list",
    "fairseq-to-hf fetch wav2vec2-base-960h",
    "fairseq-to-hf fetch hubert-base --directory downloads",
)
@click.argument("name", required=False)
@click.option("--list", "listing", is_flag=True, help="List the names of the catalogue.")
@click.option("--directory", default=Path("checkpoints"), type=click.Path(path_type=Path), show_default=True)
def command(name: str | None, listing: bool, directory: Path) -> Outcome:
    """Download a released fairseq checkpoint by name.

    An interrupted download goes on where it stopped; the file's SHA-256 is recorded beside it.
    """
    entries = catalogue()
    if listing:
        width = max(map(len, entries))
        lines = [f"{key:<{width}}  {entry.title}" for key, entry in entries.items()]
        return Outcome(True, "\n".join(lines), {"entries": [dataclasses.asdict(entry) for entry in entries.values()]})
    if name is None:
        raise ConvertError("no name was given", code="usage", key="NAME", hint="fairseq-to-hf fetch --list names them")
    context = click.get_current_context()
    done = fetch(name, directory, progress=context.obj.progress)
    entry = entries[name]
    note = "" if done.downloaded else " (was there already)"
    dictionary = f" --dict {done.dictionary}" if done.dictionary else ""
    lines = [
        f"{done.checkpoint}: {size(done.record.size)}, sha256 {done.record.sha256}{note}",
        f"licence of the weights: {entry.license or 'unknown'}",
        f"next: fairseq-to-hf convert {done.checkpoint} {name}{dictionary}",
    ]
    data = dataclasses.asdict(done.record) | {
        "checkpoint": str(done.checkpoint),
        "dictionary": str(done.dictionary) if done.dictionary else None,
        "license": entry.license,
        "twin": entry.twin,
        "downloaded": done.downloaded,
    }
    return Outcome(True, "\n".join(lines), data)
