"""Downloads a checkpoint by its name in the catalogue or by its address, and remembers its SHA-256."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from convert.errors import ConvertError, MismatchError
from convert.files import PIECE, resumable, resumed_file, sha256_of, write_file
from convert.network import InterruptedTransfer, ask, declared_size, network, public_address
from convert.reading import read_file
from convert.report import counted, json_bytes, parse_json, progress_bar


@dataclass(frozen=True, slots=True)
class Entry:
    """A released checkpoint as fairseq's README files describe it; `None` is what no source says."""

    name: str
    title: str
    address: str
    dictionary: str | None  # its address
    description: str
    license: str | None  # SPDX
    counterpart: str | None  # the Hub model of the same weights, by its name and card
    language: tuple[str, ...] | None  # ISO 639; None when there are more than a few
    datasets: tuple[str, ...]  # Hub ids, as far as its training data is on the Hub
    base_model: str | None  # the Hub id of what it was fine-tuned from
    citation: str  # arXiv number
    symbols: bool = False  # whether it has a vocabulary or labels, so that a conversion needs a dictionary

    @property
    def needs(self) -> str:
        """Say what a conversion needs beside the file."""
        if not self.symbols:
            return "nothing"
        if self.dictionary:
            return "its dictionary, which is fetched with it"
        return "a dictionary, of which fairseq lists none: --dict FILE, unless the checkpoint carries it"

    def matches(self, words: Iterable[str]) -> bool:
        """Say whether an entry has all of these words."""
        text = " ".join((self.name, self.title, self.description, *(self.language or ()), *self.datasets)).lower()
        return all(word.lower() in text for word in words)


@dataclass(frozen=True, slots=True)
class Record:
    """The file `FILE.json` beside a fetched one: which bytes came from where."""

    name: str
    address: str
    size: int
    sha256: str
    etag: str | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What `fetch` leaves behind; `downloaded` is false when everything was there and agreed with its record."""

    checkpoint: Path
    dictionary: Path | None
    record: Record
    downloaded: bool


@functools.cache
def catalogue() -> Mapping[str, Entry]:
    """Return the released checkpoints by name.

    Example:
        >>> catalogue()["wav2vec2-large-lv60-10m-self"].counterpart
        'Splend1dchan/wav2vec2-large-10min-lv60-self'
    """
    entries = json.loads(files("convert").joinpath("catalogue.json").read_text("utf-8"))["entries"]
    for fields in entries:
        fields["language"] = fields["language"] and tuple(fields["language"])
        fields["datasets"] = tuple(fields["datasets"])
    return MappingProxyType({fields["name"]: Entry(**fields) for fields in entries})


def fetch(
    name: str,
    directory: str | Path,
    *,
    entries: Mapping[str, Entry] | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
    pause: float = 1.0,
    progress: bool = False,
) -> Fetched:
    """Download a checkpoint as `NAME.pt`, its dictionary as `NAME.dict.txt`, each with its record `FILE.json`.

    An interrupted download continues where it stopped, unless the server's file has changed. A file that is there
    already is compared with its record; a record without its file says which bytes the download has to bring.

    Args:
        name: a name of the catalogue.
        directory: where the files go; made when missing.
        entries: the catalogue to look in; by default the one that ships.
        timeout: seconds without an answer or a byte after which an attempt is given up.
        attempts: how often to try; `pause` seconds lie before the second, twice as many before the third, and so on.
        progress: show a bar, if stderr is a terminal.

    Raises:
        ConvertError: unknown name, the network failed, or a file without a record is in the way.
        MismatchError: a file, or what the server sent, is not what the record says.
    """
    entries = catalogue() if entries is None else entries
    if name not in entries:
        from difflib import get_close_matches

        near = ", ".join(get_close_matches(name, entries, n=3, cutoff=0.5))
        hint = f"did you mean {near}? " * bool(near) + "all names: fairseq-to-hf fetch --list"
        raise ConvertError(f"no released checkpoint is called {name!r}", code="unknown-name", key=name, hint=hint)
    target = Path(directory, f"{name}.pt")
    target.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"timeout": timeout, "attempts": attempts, "pause": pause, "progress": progress}
    dictionary, brought = None, False
    if address := entries[name].dictionary:  # first: when its address is dead, that shows before the large transfer
        dictionary = target.with_name(f"{name}.dict.txt")
        _, brought = bring(name, address, dictionary, **options)
    record, downloaded = bring(name, entries[name].address, target, **options)
    return Fetched(target, dictionary, record, brought or downloaded)


def bring(
    name: str,
    address: str,
    target: Path,
    *,
    timeout: float = 30.0,
    attempts: int = 5,
    pause: float = 1.0,
    progress: bool = False,
) -> tuple[Record, bool]:
    """Download one file, and write its record beside it.

    Args:
        name: what the record calls it.
        address: where it is.
        target: the file to make, in a directory that is there.
        timeout, attempts, pause, progress: as for `fetch`.

    Returns:
        Its record, and whether anything was downloaded.

    Raises:
        ConvertError, MismatchError: as `fetch`.
    """
    record_path = _record_path(target)
    public = public_address(address)
    recorded = read_record(record_path)
    if target.exists():
        if recorded is None:
            message = f"{target}: is in the way and has no record {record_path.name}; left as it is"
            raise ConvertError(message, code="in-the-way", key=str(target), hint="move it away and fetch again")
        found = Record(name, public, target.stat().st_size, _sha256(target, target.name, progress), recorded.etag)
        _compare(found, recorded, target, f"move {target.name} and {record_path.name} away and fetch again")
        return recorded, False
    for attempt in range(attempts):
        time.sleep(pause * 2 ** (attempt - 1) if attempt else 0)
        try:
            return _attempt(name, address, target, recorded, timeout, progress), True
        except InterruptedTransfer as error:
            reason = error
    kept = [f"{size} bytes are kept in {part}" for part, size in resumable(target)]
    message = f"{public}: {reason}, {attempts} attempts; {', '.join(kept) or 'nothing was written'}"
    raise ConvertError(message, code="network", key=public, hint="run it again: it continues where it stopped")


def _attempt(name: str, address: str, target: Path, recorded: Record | None, timeout: float, progress: bool) -> Record:
    """Bring one version of the file, or the rest of it; then its record, then the file into its place."""
    with ask(address, timeout, "HEAD") as head:
        etag, size = head.headers["ETag"], declared_size(head, address)
    with resumed_file(target, f"{etag} {size}") as file:
        # without a strong validator nothing says that the rest belongs to these bytes (RFC 9110, 13.1.5)
        strong = etag and etag.isascii() and etag.isprintable() and not etag.startswith("W/")
        if not strong or file.seek(0, os.SEEK_END) > size:
            file.truncate(0)
        start = file.seek(0, os.SEEK_END)
        if start < size:
            resume = {"Range": f"bytes={start}-", "If-Range": etag} if start else {}
            with ask(address, timeout, headers=resume) as answer, progress_bar(target.name, show=progress) as bar:
                whole = answer.status == 200 and declared_size(answer, address) == size
                rest = (answer.status, answer.headers["Content-Range"]) == (206, f"bytes {start}-{size - 1}/{size}")
                if answer.headers["ETag"] != etag or not (whole or rest):
                    raise InterruptedTransfer("the server's file changed during the download")
                if whole:
                    file.truncate(0)
                left = size if whole else size - start
                while True:
                    with network(address):
                        piece = answer.read1(min(PIECE, left + 1))
                    if not piece:
                        break
                    left -= len(piece)
                    if left < 0:
                        file.truncate(0)
                        raise InterruptedTransfer(f"the server sent more than the {size} bytes that it declared")
                    file.write(piece)
                    if bar:
                        bar(size - left, size)
        brought = file.seek(0, os.SEEK_END)
        if brought != size:
            raise InterruptedTransfer(f"the connection ended at {brought} of {size} bytes")
        found = Record(name, public_address(address), size, _sha256(file, target.name, progress), etag)
        record_path = _record_path(target)
        if recorded:
            _compare(found, recorded, target, f"to accept the new bytes, delete {record_path.name} and fetch again")
        # the record first: killed in between, the next fetch finds the whole part and has only to rename it
        write_file(record_path, json_bytes({"schema": 1, **asdict(found)}))
    return found


def _record_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _sha256(source: Path | BinaryIO, name: str, progress: bool) -> str:
    size = source.stat().st_size if isinstance(source, Path) else os.fstat(source.fileno()).st_size
    with progress_bar(f"hash {name}", show=progress) as bar:
        advance = counted(bar, size)
        return sha256_of(source, lambda piece: advance(len(piece)))


def _compare(found: Record, recorded: Record, path: Path, hint: str) -> None:
    then, now = (f"{record.address}, {record.size} bytes, sha256 {record.sha256}" for record in (recorded, found))
    if then != now:
        message = f"{path}: recorded {then}; found {now}; nothing was changed"
        raise MismatchError(message, code="sha256", key=str(path), hint=hint)


def read_record(record_path: Path) -> Record | None:
    """Read the record of a fetched file; `None`, when there is none.

    Raises:
        ConvertError: `record`, when it is something else.
    """
    kinds: dict[str, type | tuple[type, ...]] = {
        "name": str,
        "address": str,
        "size": int,
        "sha256": str,
        "etag": (str, type(None)),
    }
    try:
        fields = parse_json(read_file(record_path), record_path.name)
        wrong = [name for name, kind in kinds.items() if not isinstance(fields[name], kind)]
        if not wrong:
            return Record(**{name: fields[name] for name in kinds})
        reason = f"{wrong[0]} is {fields[wrong[0]]!r}"
    except FileNotFoundError:
        return None
    except (ConvertError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    message = f"{record_path}: is not the record of a fetched file ({reason})"
    raise ConvertError(message, code="record", key=str(record_path), hint="delete it and fetch again")
