"""What the Hub holds now: the commit to build on, its files, its card, our pull request, its tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.errors import ConvertError, Problem
from convert.publishing.files import CARD, LocalFile
from convert.publishing.hub import ask, hub_utils, text_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TITLE = "Model converted from fairseq"  # how we know our own pull request again
UNVERIFIED = "UNVERIFIED: "
HISTORY = 30  # commits of the card that are looked through


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit; `sha256` where it is stored with LFS or xet, git's name of it otherwise."""

    size: int
    git_sha1: str
    sha256: str | None

    def holds(self, file: LocalFile) -> bool:
        """Whether these are the local file's bytes."""
        return self.sha256 == file.sha256 if self.sha256 else self.git_sha1 == file.git_sha1


@dataclass(frozen=True, slots=True)
class Remote:
    """The state of a repository at one commit.

    Args:
        exists: whether the repository is there.
        private: its visibility, `None` when it is not there.
        revision: the branch, or the ref of our pull request, that a commit would go to.
        head: the commit it points to; `None` when the branch is not there.
        pull: the number of our open pull request.
        files: the files of that commit.
        card: the bytes of its README.md.
    """

    exists: bool
    private: bool | None
    revision: str
    head: str | None
    pull: int | None
    files: Mapping[str, RemoteFile]
    card: bytes | None

    def holds(self, file: LocalFile) -> bool:
        """Whether the commit has this file with these bytes."""
        return file.name in self.files and self.files[file.name].holds(file)

    @property
    def visibility(self) -> str:
        """In a word."""
        return "private" if self.private else "public"


@dataclass(frozen=True, slots=True)
class User:
    """Who a token belongs to, and what it may do.

    Args:
        name: the user.
        role: the token's: `read`, `write` or `fineGrained`.
        owners: the namespaces that it may write to, as far as it says so.
        scoped: whether it is for some namespaces alone.
        granted: the permissions of a fine-grained token.
    """

    name: str
    role: str
    owners: frozenset[str]
    scoped: bool
    granted: frozenset[str]

    @classmethod
    def of(cls, answer: Any) -> User:
        """Read an answer of `whoami`; one of another form raises TypeError, LookupError or AttributeError."""
        name = text_of(answer["name"])
        token = (answer.get("auth") or {}).get("accessToken") or {}
        fine = token.get("fineGrained") or {}
        scopes = fine.get("scoped") or []
        owners = [org.get("name") for org in answer.get("orgs") or () if org.get("roleInOrg") != "read"]
        # such a token may not list its organisations
        owners += [str((scope.get("entity") or {}).get("name")).split("/")[0] for scope in scopes]
        granted = {text_of(permission) for scope in scopes for permission in scope.get("permissions") or ()}
        granted |= {text_of(permission) for permission in fine.get("global") or ()}
        role = str(token.get("role"))
        return cls(name, role, frozenset({name, *map(text_of, owners)}), bool(scopes), frozenset(granted))


def who(api: HfApi, repo_id: str, create_pr: bool) -> User:
    """Ask who the token belongs to, and refuse one that cannot write before anything else is done.

    A read token passes `create_repo(exist_ok=True)` and fails only at the commit.
    """
    user = ask(lambda: User.of(api.whoami()), "ask who the token belongs to", repo_id)
    needed = {"repo.write", "discussion.write"} if create_pr else {"repo.write"}
    if user.role == "read" or (user.role == "fineGrained" and user.scoped and not needed & user.granted):
        message = f"the token of {user.name} may only read; nothing was sent"
        raise ConvertError(
            message, code="read-token", hint="make a token with write permission, and set HF_TOKEN to it"
        )
    return user


def read(api: HfApi, repo_id: str, *, revision: str, create_pr: bool, name: str) -> Remote:
    """Read the state that a commit would build on.

    Args:
        api: the client.
        repo_id: the repository.
        revision: the branch to commit to.
        create_pr: look for our own open pull request, and read that one instead.
        name: the user whose pull request counts as ours.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    def look() -> Any:
        try:
            return api.model_info(repo_id)
        except RepositoryNotFoundError as error:
            if error.response.headers.get("X-Error-Code") == "GatedRepo":
                raise
            return None

    info = ask(look, f"read {repo_id}", repo_id)
    if info is None:
        return Remote(False, None, revision, None, None, {}, None)
    pull = own_pull_request(api, repo_id, name) if create_pr else None
    revision = f"refs/pr/{pull}" if pull else revision
    head = head_of(api, repo_id, revision)
    files = tree(api, repo_id, head) if head else {}
    card = _card(api, repo_id, head) if head and CARD in files else None
    return Remote(True, bool(info.private), revision, head, pull, files, card)


def head_of(api: HfApi, repo_id: str, revision: str) -> str | None:
    """Return the commit that a branch, tag or ref points to, `None` when it is not there."""
    from huggingface_hub.errors import RevisionNotFoundError

    def look() -> str | None:
        try:
            return text_of(api.model_info(repo_id, revision=revision).sha)
        except RevisionNotFoundError:
            return None

    return ask(look, f"read {revision} of {repo_id}", repo_id)


def tree(api: HfApi, repo_id: str, commit: str) -> dict[str, RemoteFile]:
    """Return every file of a commit."""

    def look() -> dict[str, RemoteFile]:
        from huggingface_hub.hf_api import RepoFile

        rows = api.list_repo_tree(repo_id, revision=commit, recursive=True)
        return {
            text_of(row.path): RemoteFile(
                int(row.size), text_of(row.blob_id), text_of(row.lfs.sha256) if row.lfs else None
            )
            for row in rows
            if isinstance(row, RepoFile)
        }

    return ask(look, f"list the files of {repo_id}", repo_id)


def own_pull_request(api: HfApi, repo_id: str, name: str) -> int | None:
    """Return the number of the open pull request that an earlier run of ours made."""

    def look() -> list[int]:
        rows = api.get_repo_discussions(
            repo_id, author=name, discussion_type="pull_request", discussion_status="open", repo_type="model"
        )
        ours = (TITLE, UNVERIFIED + TITLE)
        mine = [row for row in rows if row.author == name and row.is_pull_request]
        return [int(row.num) for row in mine if text_of(row.title).startswith(ours)]

    return max(ask(look, f"list the pull requests of {repo_id}", repo_id), default=None)


def was_published(api: HfApi, repo_id: str, head: str, card: LocalFile) -> bool:
    """Whether a card is one that the repository had before: then it is old, and not an edit."""

    def look() -> bool:
        for commit in api.list_repo_commits(repo_id, revision=head)[:HISTORY]:
            rows = api.get_paths_info(repo_id, [CARD], revision=commit.commit_id)
            if any(getattr(row, "blob_id", None) == card.git_sha1 for row in rows):
                return True
        return False

    return ask(look, f"read the history of {repo_id}", repo_id)


def _card(api: HfApi, repo_id: str, head: str) -> bytes:
    def look() -> bytes:
        utils = hub_utils()
        address = f"{api.endpoint}/{repo_id}/resolve/{head}/{CARD}"
        response = utils.get_session().get(address, headers=utils.build_hf_headers())
        utils.hf_raise_for_status(response)
        content: bytes = response.content
        return content

    return ask(look, f"read the card of {repo_id}", repo_id)


def validate(api: HfApi, repo_id: str, card: bytes) -> tuple[str, ...]:
    """Have the Hub check a card's metadata, and return its remarks.

    Raises:
        ConvertError: with status 1: the Hub would refuse the card.
    """
    utils = hub_utils()

    def look() -> tuple[tuple[str, ...], ...]:
        body = {"content": card.decode(), "repoType": "model"}
        address = f"{api.endpoint}/api/validate-yaml"
        response = utils.get_session().post(address, json=body, headers=utils.build_hf_headers())
        if response.status_code != 400:
            utils.hf_raise_for_status(response)
        answer = response.json()
        return tuple(tuple(str(row["message"]) for row in answer.get(kind) or ()) for kind in ("errors", "warnings"))

    answer = ask(look, "have the card checked", repo_id)
    errors, warnings = answer
    problems = [Problem("card", CARD, message) for message in errors]
    if problems:
        message = "the Hub would refuse the card's metadata; nothing was sent"
        hint = "correct the option or the line it names"
        raise ConvertError(message, code="card", key=CARD, status=1, problems=problems, hint=hint)
    return warnings
