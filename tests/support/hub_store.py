"""The memory of the tests' Hub: users, repositories, commits, refs, pull requests and large objects."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, or the pointer to a large object."""

    content: bytes | None = None
    sha256: str | None = None
    size: int = 0

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def git_sha1(self) -> str:
        return git_sha1(self.pointer if self.sha256 else self.content)

    def row(self, path: str) -> dict:
        row = {"type": "file", "path": path, "oid": self.git_sha1, "size": self.size}
        if self.sha256:
            row["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return row


@dataclass
class Commit:
    sha: str
    parent: str | None
    files: dict[str, Blob]
    title: str
    description: str
    author: str


@dataclass
class Pull:
    num: int
    title: str
    author: str
    status: str = "open"


class Refused(Exception):  # noqa: N818
    """An answer that says no."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Repository:
    """One repository; like the Hub, it begins with a commit that holds `.gitattributes`."""

    def __init__(self, name: str, private: bool, author: str) -> None:
        self.name, self.private = name, private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.messages: dict[str, str] = {}  # of tags
        self.pulls: list[Pull] = []
        self.lock = threading.RLock()
        self.commit(
            "main", None, {".gitattributes": Blob(b"*.safetensors filter=lfs\n", None, 26)}, (), "initial", "", author
        )

    def resolve(self, revision: str) -> str:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        if revision in self.commits:
            return revision
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str) -> dict[str, Blob]:
        return self.commits[self.resolve(revision)].files

    def history(self, revision: str) -> list[Commit]:
        found, sha = [], self.resolve(revision)
        while sha:
            found.append(self.commits[sha])
            sha = found[-1].parent
        return found

    def commit(
        self,
        revision: str,
        expected: str | None,
        write: dict[str, Blob],
        delete: tuple[str, ...],
        title: str,
        description: str,
        author: str,
        create_pr: bool = False,
    ) -> tuple[str, int | None]:
        with self.lock:
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            if ref not in self.refs and self.commits:
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = self.refs.get(ref)
            if expected and expected != head and not create_pr:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            parent = (expected or head) if create_pr else head
            files = dict(self.commits[parent].files) if parent else {}
            for name in delete:
                if files.pop(name, None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            files |= write
            told = json.dumps([parent, sorted((k, v.git_sha1) for k, v in files.items()), title, len(self.commits)])
            sha = hashlib.sha1(told.encode()).hexdigest()
            self.commits[sha] = Commit(sha, parent, files, title, description, author)
            number = None
            if create_pr:
                number = len(self.pulls) + 1
                self.pulls.append(Pull(number, title, author))
                ref = f"refs/pr/{number}"
            self.refs[ref] = sha
            return sha, number

    def edit(self, name: str, content: bytes, revision: str = "main") -> str:
        """What somebody does in the browser."""
        blob = Blob(content, None, len(content))
        return self.commit(revision, None, {name: blob}, (), f"Update {name}", "", "somebody")[0]


@dataclass
class Store:
    users: dict[str, dict] = field(default_factory=dict)  # token -> {"name", "role"}
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # sha256 -> bytes
    uploads: dict[str, bytes] = field(default_factory=dict)  # what has arrived and is not yet proved
    lock: threading.RLock = field(default_factory=threading.RLock)

    def create(self, name: str, private: bool, author: str) -> bool:
        with self.lock:
            if name in self.repositories:
                return False
            self.repositories[name] = Repository(name, private, author)
            return True
