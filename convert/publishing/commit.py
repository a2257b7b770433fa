"""Sends one commit, and finds out what became of it when the answer is lost; never sends it twice blindly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.errors import ConvertError
from convert.publishing.files import LocalFile
from convert.publishing.hub import (
    ask,
    explain,
    lacks_xet,
    recoverable,
    rest,
    status_of,
    text_of,
    unanswered,
    waiting_time,
)
from convert.publishing.remote import Remote, RemoteFile, head_of, own_pull_request, tree
from convert.reading import open_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOST = (0.0, 1.0, 2.0, 4.0, 8.0)  # seconds between looks for a commit whose answer is lost; a new try does no harm
LOST_PULL = (*LOST, 16.0, 32.0)  # for a pull request it does: the Hub gives up after 60 seconds
_SHORT, _TOGETHER = 1 << 24, 100  # bytes of a file that is sent with others, and how many at once
HISTORY = 50  # commits on top of ours that are looked through


@dataclass(frozen=True, slots=True)
class Plan:
    """One commit: the files that are there after it, those it deletes, and what it says."""

    repo_id: str
    write: tuple[LocalFile, ...]
    delete: tuple[str, ...]
    title: str
    description: str
    create_pr: bool
    public: bool

    def done_in(self, files: Mapping[str, RemoteFile]) -> bool:
        """Whether a commit's files are what this commit would leave behind."""
        written = all(file.name in files and files[file.name].holds(file) for file in self.write)
        return written and not any(name in files for name in self.delete)


@dataclass(frozen=True, slots=True)
class Receipt:
    """A commit that is on the Hub, and the pull request it belongs to."""

    commit: str
    pull: int | None


class Moved(Exception):  # noqa: N818
    """Somebody else committed meanwhile: read again, plan again."""


def prepare(api: HfApi, plan: Plan, remote: Remote) -> Remote:
    """Create the repository and the branch when they are not there; an existing repository stays as visible as it is."""
    if not remote.exists:

        def create() -> None:
            api.create_repo(plan.repo_id, private=not plan.public, exist_ok=True)

        ask(create, f"create {plan.repo_id}", plan.repo_id)  # twice does no harm: exist_ok
    if remote.head is None and remote.exists:

        def branch() -> None:
            api.create_branch(plan.repo_id, branch=remote.revision, exist_ok=True)

        ask(branch, f"create the branch {remote.revision} of {plan.repo_id}", plan.repo_id)
    if remote.head is None:
        head = head_of(api, plan.repo_id, remote.revision)
        if head is None and remote.revision != "main":
            return prepare(api, plan, Remote(True, not plan.public, remote.revision, None, None, {}, None))
        files = tree(api, plan.repo_id, head) if head else {}
        return Remote(True, not plan.public, remote.revision, head, None, files, None)
    return remote


def send(api: HfApi, plan: Plan, remote: Remote) -> Receipt:
    """Upload the files and commit them on top of `remote.head`.

    Args:
        api: the client.
        plan: the commit.
        remote: what it builds on, as `prepare` left it.

    Raises:
        Moved: the branch no longer points to `remote.head`, and not because of this commit.
        ConvertError: it is not on the Hub, or (said so) nobody can know yet.
    """
    operations = _upload(api, plan, remote)
    new_pull = plan.create_pr and remote.pull is None
    perhaps = False  # whether an attempt may have been carried out
    for attempt in range(3):
        try:
            made = api.create_commit(
                plan.repo_id,
                operations,
                commit_message=plan.title,
                commit_description=plan.description,
                revision=None if new_pull else remote.revision,
                parent_commit=remote.head,
                create_pr=new_pull,
            )
            number = int(made.pr_num) if made.pr_num is not None else remote.pull
            return Receipt(text_of(made.oid), number)
        except recoverable() as error:
            status, lost = status_of(error), unanswered(error)
            perhaps = perhaps or lost
            wait = waiting_time(error, attempt)
            failure = explain(error, f"commit to {plan.repo_id}", plan.repo_id)
        if not lost and status not in (409, 412, 429) and wait is None:
            raise failure
        receipt = _pull_request(api, plan, lost) if new_pull else _settle(api, plan, remote, lost, perhaps)
        if receipt is not None:
            return receipt
        if new_pull and lost:  # a second one would be an orphan, should the first still come
            raise ConvertError(
                f"the Hub did not confirm the pull request to {plan.repo_id}, and it cannot be found yet",
                code="no-answer",
                key=plan.repo_id,
                hint="run it again in a minute: it continues with the pull request, if there is one",
            )
        if status == 429 and wait is None:
            raise failure
        rest(wait if wait is not None else 1.0)
    raise failure


def _upload(api: HfApi, plan: Plan, remote: Remote) -> list[Any]:
    """Send the largest files one after the other, so that Ctrl-C needs no thread's consent and a new run goes on."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = []
    for file in plan.write:
        if remote.holds(file):
            continue
        addition = CommitOperationAdd(file.name, file.content or b"")
        if file.path is not None and file.content is None:  # given the path, some clients would hash the file again
            addition.path_or_fileobj = str(file.path)
            with open_file(file.path) as opened:
                addition.upload_info.sample = opened.read(512)
            addition.upload_info.size = file.path.stat().st_size
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # the proved bytes, or the Hub refuses
        if addition.upload_info.size != file.size:
            _changed(file.name)
        additions.append(addition)
    large = [addition for addition in additions if not isinstance(addition.path_or_fileobj, bytes)]
    small = [addition for addition in additions if isinstance(addition.path_or_fileobj, bytes)]
    for group in [*_groups(large), small]:
        names = ", ".join(addition.path_in_repo for addition in group[:5])
        names += f" and {len(group) - 5} more" if len(group) > 5 else ""
        _send_group(api, plan, remote, group, names)
    for file in plan.write:
        if not file.is_unchanged():  # the Hub may believe the hash that the client names
            _changed(file.name)
    return [*additions, *(CommitOperationDelete(name) for name in plan.delete)]


def _groups(additions: Sequence[Any]) -> list[list[Any]]:
    """Put a hundred files into one request, such as the adapters of languages, where each takes a moment; others go alone."""
    short = [addition for addition in additions if addition.upload_info.size <= _SHORT]
    alone = [[addition] for addition in additions if addition.upload_info.size > _SHORT]
    return alone + [short[start : start + _TOGETHER] for start in range(0, len(short), _TOGETHER)]


def _send_group(api: HfApi, plan: Plan, remote: Remote, group: Sequence[Any], names: str) -> None:
    def upload() -> None:
        api.preupload_lfs_files(
            plan.repo_id,
            group,
            revision=remote.revision,
            create_pr=plan.create_pr and remote.pull is None,
            num_threads=1,
            free_memory=False,
        )

    def without_xet() -> None:
        upload()
        for addition in opened:
            addition.path_or_fileobj.close()

    try:
        upload()
        return
    except recoverable() as error:
        xet = lacks_xet(error)
        failure = explain(error, f"upload {names} to {plan.repo_id}", plan.repo_id)
    if not xet:
        raise failure
    import io

    opened = []  # the client sends an open file with LFS, whatever it thinks of xet
    for addition in group:
        source = addition.path_or_fileobj
        is_bytes = isinstance(source, bytes)
        addition.path_or_fileobj = io.BytesIO(source) if is_bytes else open_file(source)
        opened += [] if is_bytes else [addition]
    ask(without_xet, f"upload {names} to {plan.repo_id}", plan.repo_id, repeat=False)


def _settle(api: HfApi, plan: Plan, remote: Remote, lost: bool, perhaps: bool) -> Receipt | None:
    """Look for the commit whose answer is missing: ours, `None` when nothing happened, `Moved` when something else did."""
    for pause in LOST if lost else (0.0,):
        rest(pause)
        if head_of(api, plan.repo_id, remote.revision) == remote.head:
            continue
        commits = [text_of(row.commit_id) for row in _commits(api, plan.repo_id, remote.revision)]
        new = commits[: commits.index(remote.head)] if remote.head in commits else commits
        for commit in reversed(new if perhaps else []):  # the first of them: others may stand on top of ours
            if plan.done_in(tree(api, plan.repo_id, commit)):
                return Receipt(commit, remote.pull)
        raise Moved
    return None


def _commits(api: HfApi, repo_id: str, revision: str) -> list[Any]:
    return ask(lambda: api.list_repo_commits(repo_id, revision=revision)[:HISTORY], f"read {repo_id}", repo_id)


def _pull_request(api: HfApi, plan: Plan, lost: bool) -> Receipt | None:
    name = ask(lambda: text_of(api.whoami()["name"]), "ask who the token belongs to", plan.repo_id)
    for pause in LOST_PULL if lost else (0.0,):
        rest(pause)
        number = own_pull_request(api, plan.repo_id, name)
        head = head_of(api, plan.repo_id, f"refs/pr/{number}") if number else None
        if head and plan.done_in(tree(api, plan.repo_id, head)):
            return Receipt(head, number)
    return None


def prove(api: HfApi, plan: Plan, commit: str) -> None:
    """Compare every file of the commit with what was to be published, hash by hash.

    Raises:
        ConvertError: with status 1: the Hub holds other bytes.
    """
    files = tree(api, plan.repo_id, commit)
    wrong = [file.name for file in plan.write if file.name not in files or not files[file.name].holds(file)]
    wrong += [name for name in plan.delete if name in files]
    if wrong:
        message = f"{plan.repo_id} at {commit[:12]} does not hold what was published: {', '.join(sorted(wrong))}"
        hint = "do not use this revision; run it again, and report it to the Hub if it stays"
        raise ConvertError(message, code="other-bytes", key=wrong[0], status=1, hint=hint)


def _changed(name: str) -> None:
    message = f"{name}: changed after it was compared with the verification; nothing was committed"
    raise ConvertError(message, code="changed", key=name, status=1, hint="verify again, and publish again")
