"""Which files of a model directory may be published, what their bytes are, and what must not be in them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.conversion import NAME as CONVERSION
from convert.conversion import Record
from convert.errors import ConvertError, Problem
from convert.files import sha256_of, stamp
from convert.reading import read_file
from convert.report import Progress, counted, parse_json

SMALL = 10 << 20  # the Hub stores larger files with LFS, whatever they hold
LARGEST_TEXT = 100 << 20  # conversion.json of a model of 1,000 languages has 25 MB

# What `from_pretrained` may read: these have to be the verified bytes.
MODEL = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(adapter\.[\w-]+|own_adapter|final_proj)\.safetensors"
    r"|(generation_|preprocessor_|processor_|tokenizer_)?config\.json|vocab\.json|tokenizer\.json"
    r"|special_tokens_map\.json|added_tokens\.json|alphabet\.json|sentencepiece\.bpe\.model"
    r"|language_model/(attrs\.json|unigrams\.txt|[\w-][\w.-]*\.(bin|binary|arpa))"
)
OURS = ("conversion.json", "verification.json", "evaluation.json")
BESIDE = re.compile(r"LICENSE(\.txt|\.md)?|NOTICE|sample\.(wav|flac)")
CARD = "README.md"

# of the Hub, of AWS, of GitHub, of GitLab, of Google, of OpenAI, of Slack; signed ones; private keys; passwords in addresses;
# and by the name that stands before it
_SECRET = re.compile(
    rb"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}\b|gh[opsur]_[A-Za-z0-9]{36}|github_pat_\w{40}|glpat-[\w-]{20}"
    rb"|AIza[\w-]{35}|sk-[\w-]{32,}|xox[abeoprs]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^\s/@:\"'<>]+:[^\s/@\"'<>]+@"
    rb"|(?i:secret|passwo?r?d|api[_-]?key|(access|auth|private)[_-]?(key|token))[\w-]*[\"']?\s*[:=]\s*[\"']?(?=[\w+/-]*\d)[\w+/-]{12}"
)
_HOME = re.compile(r"(/home/|/Users/|/root/|/private/|/tmp/|file://|[A-Za-z]:\\)")
_TEXTS = (".json", ".md", ".txt", "LICENSE", "NOTICE")
_SYMBOLS = ("vocab.json", "tokenizer.json", "alphabet.json")  # a phoneme may well be written /a/
_OF_SYMBOLS = ("dictionary.", "dictionaries.", "languages.")  # in conversion.json
_ABSOLUTE = re.compile(r"/[\w.@+-]+(/[\w.@+-]*)+")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One file as it will be published; `content` holds a small or a text file's bytes, so that no later change slips in."""

    name: str
    size: int
    sha256: str
    git_sha1: str | None  # None where the Hub will use LFS for certain
    path: Path | None
    content: bytes | None
    stamp: tuple[int, ...] = ()  # of a large file when it was hashed

    def is_unchanged(self) -> bool:
        """Whether a file that was not kept in memory still has the bytes it was hashed with."""
        if self.content is not None or self.path is None or stamp(self.path.stat()) == self.stamp:
            return True
        return _hash(self.name, self.path).sha256 == self.sha256

    @classmethod
    def of_bytes(cls, name: str, content: bytes) -> LocalFile:
        """Describe bytes that are not on the disk."""
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), git_sha1(content), None, content)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The files of a model directory: those to publish, and those left out with the reason."""

    directory: Path
    files: dict[str, LocalFile]
    card: bytes | None
    left_out: tuple[tuple[str, str], ...]

    def json(self, name: str) -> Any:
        """Return a JSON file's value, `None` when there is no such file."""
        return parse_json(self.files[name].content or b"", name) if name in self.files else None

    def record(self) -> Record:
        """Read conversion.json.

        Raises:
            ConvertError: `not-a-model`: it is not there, or is not what a conversion writes.
        """
        if CONVERSION not in self.files:
            message = f"{CONVERSION} is missing: the directory does not say what it was made from"
            hint = "fairseq-to-hf convert CHECKPOINT OUT makes a model directory"
            raise ConvertError(message, code="not-a-model", key=CONVERSION, hint=hint)
        return Record.of(self.files[CONVERSION].content or b"")


def git_sha1(content: bytes) -> str:
    """Return the name that git gives to a file of these bytes.

    Example:
        >>> git_sha1(b"")
        'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
    """
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read(directory: str | Path, progress: Progress | None = None) -> Inventory:
    """List and hash the files of a model directory that may be published.

    Args:
        directory: the model directory.
        progress: called with (bytes hashed, bytes in all).

    Raises:
        ConvertError: it is not a model directory (status 2), or a file holds or points to what must not leave (status 1).
    """
    root = Path(directory)
    if not root.is_dir():
        raise ConvertError(f"{directory}: no such directory", code="no-directory", key=str(directory))
    files: dict[str, LocalFile] = {}
    left_out: list[tuple[str, str]] = []
    problems: list[Problem] = []
    card: bytes | None = None
    paths = list(_walk(root))
    advance = counted(progress, sum(path.lstat().st_size for path in paths))
    for path in paths:
        name = path.relative_to(root).as_posix()
        reason = _reason_to_leave_out(name, path)
        if reason:
            left_out.append((name, reason))
            advance(path.lstat().st_size)
        elif not path.resolve().is_relative_to(root.resolve()):
            problems.append(Problem("link-outside", name, "is a link to a file outside the model directory"))
        else:
            file = _hash(name, path, advance)
            problems += _leaks(file)
            if name == CARD:
                card = file.content
            else:
                files[name] = file
    if problems:
        message = f"{len(problems)} files must not be published as they are; nothing was sent"
        hint = "convert again with this version of fairseq-to-hf, or take the named text out and verify again"
        raise ConvertError(message, code="unsafe-file", status=1, problems=problems, hint=hint)
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        message = f"{root.name}: holds no model: config.json and model.safetensors are needed"
        raise ConvertError(
            message, code="no-model", key=root.name, hint="fairseq-to-hf convert CHECKPOINT OUT makes one"
        )
    return Inventory(root, files, card, tuple(left_out))


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (Path(folder, name) for name in folders if Path(folder, name).is_symlink())
        yield from (Path(folder, name) for name in sorted(names))


def _reason_to_leave_out(name: str, path: Path) -> str:
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    if not path.is_file():
        return "not a plain file"
    if name == CARD or name in OURS or MODEL.fullmatch(name) or BESIDE.fullmatch(name):
        return ""
    if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}:
        return "pickled data can run code where it is loaded"
    return "not part of a model"


def _hash(name: str, path: Path, advance: Callable[[int], None] = lambda count: None) -> LocalFile:
    size = path.stat().st_size
    if size <= (LARGEST_TEXT if name.endswith(_TEXTS) else SMALL) and not name.endswith(".safetensors"):
        content = read_file(path, LARGEST_TEXT)
        advance(len(content))
        sha1 = git_sha1(content) if len(content) <= SMALL else None
        return LocalFile(name, len(content), hashlib.sha256(content).hexdigest(), sha1, path.resolve(), content)
    before = stamp(path.stat())
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if size <= SMALL else None

    def also(piece: memoryview) -> None:
        if digest:
            digest.update(piece)
        advance(len(piece))

    sha256 = sha256_of(path, also)
    return LocalFile(name, size, sha256, digest.hexdigest() if digest else None, path.resolve(), None, before)


def _leaks(file: LocalFile) -> list[Problem]:
    if file.content is None:
        large = file.size > SMALL and file.name.endswith(_TEXTS)
        return [Problem("too-large", file.name, f"has {file.size} bytes, and cannot be searched")] if large else []
    if _SECRET.search(file.content.replace(b"\0", b"")):  # UTF-16 too
        return [Problem("token", file.name, "holds what looks like a token or a password")]
    if not file.name.endswith(".json") or file.name in _SYMBOLS:
        return []
    try:
        value = parse_json(file.content, file.name)
    except ConvertError:
        return [Problem("not-json", file.name, "is not JSON")]
    found = sorted({key for key, text in _texts(value, "") if private(text) and not key.startswith(_OF_SYMBOLS)})
    return [Problem("private-path", file.name, f"{key} names a path of the machine it was made on") for key in found]


def private(text: str) -> bool:
    """Say whether a text is, or names, a path of somebody's machine.

    Example:
        >>> private("/checkpoint/someone/data"), private("https://example.org/a/b"), private("k/w/m")
        (True, False, False)
    """
    home = os.environ.get("HOME", "")
    return bool(_HOME.search(text) or _ABSOLUTE.fullmatch(text) or (len(home) > 5 and home in text))


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}.{number}")
    elif isinstance(value, str):
        yield key, value
