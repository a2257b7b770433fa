"""`fairseq-to-hf fetch`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from convert.cli import Outcome
from convert.cli import command as make
from convert.errors import ConvertError
from convert.fetching import Entry, catalogue, fetch
from convert.report import quoted, size
from convert.sources import DIRECTORY


@make(
    "fetch",
    "fairseq-to-hf fetch --list wav2vec2 large",
    "fairseq-to-hf fetch wav2vec2-base-960h",
    "fairseq-to-hf fetch wav2vec2-base --directory downloads",
)
@click.argument("words", metavar="NAME", nargs=-1)
@click.option(
    "--list",
    "listing",
    is_flag=True,
    help="List the released checkpoints: all, or those that have every word given as NAME.",
)
@click.option(
    "--directory", default=DIRECTORY, type=click.Path(path_type=Path), show_default=True, help="Where to keep it."
)
def command(words: tuple[str, ...], listing: bool, directory: Path) -> Outcome:
    """Download a released fairseq checkpoint by name.

    An interrupted download continues where it stopped. The address and SHA-256 are recorded beside the file.
    """
    entries = catalogue()
    if listing:
        return _list([entry for entry in entries.values() if entry.matches(words)], words)
    if len(words) != 1:
        given = f"{len(words)} names were given" if words else "no name was given"
        raise ConvertError(given, code="usage", key="NAME", hint="fairseq-to-hf fetch --list shows them")
    (name,) = words
    context = click.get_current_context()
    done = fetch(name, directory, progress=context.obj.progress)
    entry = entries[name]
    note = "" if done.downloaded else " (was there already)"
    dictionary = f" --dict {quoted(done.dictionary)}" if done.dictionary else ""
    source = f"{quoted(done.checkpoint)} {name}{dictionary}" if directory != DIRECTORY else f"{name} my-model"
    lines = [
        f"{done.checkpoint}: {size(done.record.size)}, sha256 {done.record.sha256}{note}",
        f"licence of the weights: {entry.license or 'unknown'}",
        f"needed beside it: {entry.needs}",
        f"next: fairseq-to-hf convert {source}",
    ]
    data = dataclasses.asdict(done.record) | {
        "checkpoint": str(done.checkpoint),
        "dictionary": str(done.dictionary) if done.dictionary else None,
        "license": entry.license,
        "needs": entry.needs,
        "counterpart": entry.counterpart,
        "downloaded": done.downloaded,
    }
    return Outcome(True, lines, data)


def _list(found: list[Entry], words: tuple[str, ...]) -> Outcome:
    rows = [dataclasses.asdict(entry) | {"needs": entry.needs} for entry in found]
    if not found:
        return Outcome(False, f"no released checkpoint has all of these words: {' '.join(words)}", {"entries": rows})
    width = max(len(entry.name) for entry in found)
    lines = [f"{entry.name:<{width}}  {entry.title}; needs {entry.needs}" for entry in found]
    return Outcome(True, "\n".join(lines), {"entries": rows})
