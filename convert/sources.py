"""Where a checkpoint is: a path, a name of the catalogue, an https address, or a file of a repository on the Hub."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from convert.checkpoint import Checkpoint, Origin, open_checkpoint
from convert.errors import ConvertError, named_by
from convert.families import ANCHORS

DIRECTORY = Path("checkpoints")  # where downloads go
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([^/]+))?/(.+)")
_ADDRESS = re.compile(r"(\w[\w+.-]*)://")
_DICTIONARY = re.compile(r"dict\b[\w.-]*\.txt")


def open_source(source: str | Path, *, base: str | Path | None = None, **options: Any) -> Checkpoint:
    """Open a checkpoint wherever it is; what is not on this machine is fetched first.

    Args:
        source: a path, a name of the catalogue (`wav2vec2-base-960h`), an address (`https://...`), or
            `hf://USER/REPO/FILE.pt`, with a revision as `hf://USER/REPO@REVISION/FILE.pt`.
        base: as for `open_checkpoint`; a source as well.
        options: as for `open_checkpoint`.

    Raises:
        ConvertError: it cannot be fetched.
        CheckpointError: it cannot be read, as for `open_checkpoint`.
    """
    path, origin = locate(source)
    if base is not None:
        with named_by("--base"):
            base, _ = locate(base)
    opened = open_checkpoint(path, anchors=ANCHORS, base=base, **options)
    return replace(opened, origin=origin)


def dictionary_beside(opened: Checkpoint) -> Path | None:
    """Return the dictionary that lay where a checkpoint was fetched from, if the checkpoint has none of its own."""
    own = opened.dictionary is not None or opened.groups
    return None if own or opened.origin is None else opened.origin.dictionary


def locate(source: str | Path) -> tuple[Path, Origin | None]:
    """Find a file on this machine, or fetch it; and say where it was fetched from.

    Args:
        source: as for `open_source`.

    Raises:
        ConvertError: it cannot be fetched.
    """
    text = os.fspath(source)
    if isinstance(source, Path) or os.path.lexists(text):
        return Path(text), None
    return _fetched(text)


@functools.cache  # a command may open a file more than once: what was fetched is fetched, and hashed, once
def _fetched(text: str) -> tuple[Path, Origin | None]:
    from convert.fetching import catalogue, fetch
    from convert.network import public_address

    scheme = _ADDRESS.match(text)
    if scheme and scheme[1] == "hf":
        return _from_hub(text)
    if scheme and scheme[1] in ("http", "https"):
        return _from_address(text)
    if scheme:
        message = f"{public_address(text)}: {scheme[1]}:// is not supported; nothing was fetched"
        hint = "give an https address, hf://USER/REPO/FILE.pt, or download the file yourself"
        raise ConvertError(message, code="unknown-address", key=public_address(text), hint=hint)
    if text in catalogue() or (not Path(text).suffix and Path(text).name == text):
        try:
            done = fetch(text, DIRECTORY, progress=_progress())
        except ConvertError as error:
            if error.code != "unknown-name":
                raise
            message = f"no file and no released checkpoint is called {text!r}"
            raise ConvertError(message, code=error.code, key=text, hint=error.hint) from None
        return done.checkpoint, Origin(done.record.address, text, done.record.sha256, done.dictionary)
    return Path(text), None


def _from_address(address: str) -> tuple[Path, Origin]:
    from convert.fetching import bring
    from convert.network import public_address

    public = public_address(address)
    if "@" in urlsplit(address).netloc:
        message = f"{public}: an address with a user and a password is not fetched: they would go to every redirect"
        raise ConvertError(message, code="unknown-address", key=public, hint="download the file yourself")
    parts = urlsplit(address)
    name = Path(re.sub(r"[^\w.+-]", "_", unquote(parts.path).rpartition("/")[2]).lstrip(".") or "checkpoint.pt")
    # what a query asks for is another file, though it may be a secret and is not kept
    query = "-" + hashlib.sha256(parts.query.encode()).hexdigest()[:8] if parts.query else ""
    target = DIRECTORY / f"{name.stem}{query}{name.suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    record, _ = bring(target.stem, address, target, progress=_progress())
    return target, Origin(public, "", record.sha256, None)


def _from_hub(text: str) -> tuple[Path, Origin]:
    """Bring a file of a repository into the cache of the Hub's client, and the dictionary beside it, if there is one."""
    from convert.publishing.hub import ask, client

    parts = _HUB.fullmatch(text)
    if parts is None:
        message = f"{text}: does not name a file of a repository"
        raise ConvertError(
            message, code="usage", key=text, hint="write hf://USER/REPO/FILE.pt, or hf://USER/REPO@REVISION/FILE.pt"
        )
    repository, revision, name = parts[1], parts[2] and unquote(parts[2]), parts[3]
    with client(30.0, _progress()) as api:

        def download(file: str, commit: str | None) -> Path:
            what = f"fetch {file} from {repository}"
            return Path(ask(lambda: api.hf_hub_download(repository, file, revision=commit), what, repository))

        path = download(name, revision)
        # the cache keeps a file below the name of the commit that it is from
        folder = path.parents[len(Path(name).parts) - 1]
        dictionaries = _beside(api, repository, folder, name)
        dictionary = download(dictionaries[0], folder.name) if len(dictionaries) == 1 else None
    return path, Origin(f"hf://{repository}@{folder.name}/{name}", "", "", dictionary)


def _beside(api: Any, repository: str, folder: Path, name: str) -> list[str]:
    """List the dictionaries in the folder of a file: of the repository, or of the cache, where the Hub gives no answer."""
    from convert.publishing.hub import recoverable

    try:
        names = list(api.list_repo_files(repository, revision=folder.name))
    except recoverable():
        names = [str(path.relative_to(folder)) for path in folder.rglob("*.txt")]
    inside = name.rpartition("/")[0]
    return [one for one in names if one.rpartition("/")[0] == inside and _DICTIONARY.fullmatch(one.rpartition("/")[2])]


def _progress() -> bool:
    """Whether a command is running that shows progress."""
    import click

    context = click.get_current_context(silent=True)
    return bool(getattr(getattr(context, "obj", None), "progress", False))
