"""Publishes a model directory: gate, plan, one commit, proof, tag."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from convert.errors import ConvertError, Problem
from convert.files import write_file
from convert.publishing import card as cards
from convert.publishing import check as checks
from convert.publishing import gate, tags
from convert.publishing.commit import Moved, Plan, Receipt, prepare, prove, send
from convert.publishing.facts import Facts, Stated, digest, gather
from convert.publishing.files import CARD, MODEL, Inventory, LocalFile
from convert.publishing.files import read as read_directory
from convert.publishing.hub import client
from convert.publishing.plan import Wish, make, may_write, refuse_conflict
from convert.publishing.remote import UNVERIFIED, Remote, read, validate, who
from convert.report import progress_bar, without_user

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REF = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)|[./]$))[A-Za-z0-9_][\w.+/-]{0,199}", re.ASCII)  # as git takes it
_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)
_MODEL = re.compile(rf"{_WORD.pattern}(/{_WORD.pattern})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Published:
    """What stands on the Hub now, or would after a dry run.

    Args:
        revision: the commit that holds the model; `None` in a dry run that would make one.
        committed: whether this run made a commit; false when nothing had changed.
        target: the branch, or the ref of the pull request, that the commit goes to.
        created: whether the repository was not there before.
        files: name, size and sha256 of every file, the card included.
        changed: the names of those that the commit writes.
        deleted: the names of those that it deletes.
        left_out: files of the directory that are not published, with the reason.
        unknown: what the card does not say, because nobody knows it.
        notes: what the Hub or the plan remarks.
        card_diff: what changes in the card.
        checked: whether the model was loaded from the Hub and computed the same.
    """

    repo_id: str
    url: str
    verified: bool
    dry_run: bool
    committed: bool
    target: str
    created: bool
    visibility: str
    revision: str | None
    pull_request: int | None
    tag: str | None
    files: tuple[tuple[str, int, str], ...]
    changed: tuple[str, ...]
    deleted: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]
    card_diff: str
    checked: bool


def publish(
    model_dir: str | Path,
    repo_id: str,
    *,
    unverified: bool = False,
    public: bool = False,
    create_pr: bool = False,
    revision: str = "main",
    tag: str | None = None,
    stated: Stated | None = None,
    card: Literal["hub", "local"] | None = None,
    delete_stale: bool = False,
    check: bool = False,
    dry_run: bool = False,
    timeout: float = 120.0,
    progress: bool = False,
) -> Published:
    """Push a verified model directory to the Hub, in one commit, with a card that is written from what is known.

    The token comes from `HF_TOKEN` or `hf auth login`. Running it again is safe: what is there already is not sent
    again, and no commit is made when nothing changed.

    Args:
        model_dir: a directory that `convert` made and `verify` passed.
        repo_id: `USER/NAME` or `ORGANISATION/NAME`; created when it is not there.
        unverified: publish without a verification, and say so in the card, the commit and the tag.
        public: create the repository visible to everybody; an existing one stays as visible as it is.
        create_pr: propose the change as a pull request, or go on with our own open one.
        revision: the branch to commit to.
        tag: the name of the revision, for the card's snippets; by default made from the files' hashes.
        stated: license, language, datasets, base model and catalogue name, as a person states them.
        card: which README.md to keep when the Hub's and the directory's were both edited.
        delete_stale: delete, in the same commit, files of another model that would be loaded with this one.
        check: load the model from the Hub afterwards and compare what it computes; needs torch and transformers.
        dry_run: check and plan everything, write nothing.
        timeout: seconds without an answer after which a request is given up.
        progress: show progress bars.

    Returns:
        What stands on the Hub.

    Raises:
        ConvertError: with status 1, the gate or a conflict says no; with status 2, no answer was to be had.
        MismatchError: with `check`, the published model computes something else.

    Example:
        >>> publish("my-model", "me/my-model", dry_run=True)  # doctest: +SKIP
        Published(repo_id='me/my-model', ...)
    """
    if not _NAME.fullmatch(repo_id):
        raise ConvertError(f"{repo_id!r} is not a repository name", code="name", key=repo_id, hint="USER/NAME")
    stated = stated or Stated()
    _check_names(stated, revision, tag)
    if create_pr and (tag or revision != "main"):
        message = "a pull request goes to main and has no tag before it is merged"
        raise ConvertError(message, code="usage", hint="leave --tag and --revision out, or --create-pr")
    with progress_bar("hash", show=progress) as bar:
        inventory = read_directory(model_dir, bar)
    proof = None if unverified else gate.check(inventory)
    if unverified:
        inventory = replace(inventory, files={k: v for k, v in inventory.files.items() if k != "verification.json"})
    pin = None if create_pr else tag or f"{'un' if unverified else ''}verified-{digest(inventory)}"
    facts = gather(inventory, repo_id, verification=proof, pin=pin, stated=stated)
    # what was not verified has at least to load
    expected = checks.compute(inventory.directory, facts.class_name) if check or unverified else None
    wish = Wish(public, create_pr, revision, card, delete_stale)
    with client(timeout, progress) as api:
        answer = _run(api, inventory, facts, wish, dry_run)
        if check and expected is not None and answer.revision and not dry_run:
            found = checks.compute(repo_id, facts.class_name, answer.revision)
            checks.same(expected, found, repo_id, answer.revision)
            answer = replace(answer, checked=True)
    return answer


def _check_names(stated: Stated, revision: str, tag: str | None) -> None:
    """Refuse what the Hub would, before anything is hashed, sent or written into a card."""
    names = [("--revision", revision, _REF), *([("--tag", tag, _REF)] if tag is not None else [])]
    names += [("--license", stated.license, _WORD)] if stated.license is not None else []
    names += [("--language", language, _WORD) for language in stated.language]
    names += [("--dataset", dataset, _MODEL) for dataset in stated.datasets]
    names += [("--base-model", stated.base_model, _MODEL)] if stated.base_model is not None else []
    problems = [
        Problem("name", option, f"{name!r} is not a name of the Hub")
        for option, name, kind in names
        if not kind.fullmatch(name)
    ]
    if problems:
        raise ConvertError("; ".join(map(str, problems)), code="name", problems=problems)


def _run(api: HfApi, inventory: Inventory, facts: Facts, wish: Wish, dry_run: bool) -> Published:
    try:
        user = who(api, facts.repo_id, wish.create_pr)
    except ConvertError as error:
        if error.code != "no-token" or not dry_run:
            raise
        nowhere = Remote(False, None, wish.revision, None, None, {}, None)
        note = "there is no Hub token: the repository on the Hub was not looked at"
        return _finish(
            api, inventory, facts, make(api, inventory, facts, nowhere, wish), nowhere, None, (note,), [], True
        )
    may_write(user, facts.repo_id, wish.create_pr)
    model = [file for file in inventory.files.values() if MODEL.fullmatch(file.name)]
    first: Remote | None = None
    for _ in range(5):
        remote = read(api, facts.repo_id, revision=wish.revision, create_pr=wish.create_pr, name=user.name)
        if wish.create_pr and not remote.exists:
            message = (
                f"{facts.repo_id} does not exist, or the token may not read it: there is nothing to propose a change to"
            )
            raise ConvertError(message, code="not-found", key=facts.repo_id, hint="leave --create-pr out to create it")
        first = first or remote
        plan = make(api, inventory, facts, remote, wish)
        refuse_conflict(plan, first, remote)
        notes = validate(api, facts.repo_id, plan.write[-1].content or b"")
        done = plan.done_in(remote.files)
        if facts.pin and remote.exists:
            tags.check(api, facts.repo_id, facts.pin, model, remote.head if done else None)
        if dry_run or done:
            receipt = None
            break
        remote_now = prepare(api, plan, remote)
        try:
            receipt = send(api, plan, remote_now)
            break
        except Moved:
            first = first if first.exists else remote_now
    else:
        message = f"{facts.repo_id} changes faster than it can be committed to; nothing was committed"
        raise ConvertError(message, code="conflict", key=facts.repo_id, status=1, hint="run it again later")
    return _finish(api, inventory, facts, plan, remote, receipt, notes, model, dry_run)


def _finish(
    api: HfApi,
    inventory: Inventory,
    facts: Facts,
    plan: Plan,
    remote: Remote,
    receipt: Receipt | None,
    notes: tuple[str, ...],
    model: list[LocalFile],
    dry_run: bool,
) -> Published:
    done = plan.done_in(remote.files)
    commit = receipt.commit if receipt else remote.head if done else None
    if receipt:
        prove(api, plan, receipt.commit)
    if facts.pin and commit and not dry_run:
        title = "" if facts.verified else UNVERIFIED
        message = f"{title}the files that {facts.repo_id}'s card names"
        tags.place(api, facts.repo_id, facts.pin, model, commit, message)
    content = plan.write[-1].content or b""
    if not dry_run:
        notes += _keep(inventory, content)
    visibility = remote.visibility if remote.exists else "public" if plan.public else "private"
    if remote.exists and plan.public and remote.private:
        notes += ("the repository is private and stays so: --public is for new ones",)
    files = plan.write
    return Published(
        repo_id=facts.repo_id,
        url=without_user(f"{api.endpoint}/{facts.repo_id}"),
        verified=facts.verified,
        dry_run=dry_run,
        committed=receipt is not None,
        target="a new pull request" if plan.create_pr and remote.pull is None else remote.revision,
        created=not remote.exists and not dry_run,
        visibility=visibility,
        revision=commit,
        pull_request=receipt.pull if receipt else remote.pull,
        tag=facts.pin,
        files=tuple((file.name, file.size, file.sha256) for file in files),
        changed=tuple(file.name for file in files if not remote.holds(file)),
        deleted=plan.delete,
        left_out=inventory.left_out,
        unknown=facts.unknown,
        notes=notes,
        card_diff=cards.diff(remote.card, content),
        checked=False,
    )


def _keep(inventory: Inventory, card: bytes) -> tuple[str, ...]:
    if inventory.card == card:
        return ()
    try:
        write_file(inventory.directory / CARD, card)
    except (OSError, ConvertError) as error:
        reason = error.message if isinstance(error, ConvertError) else error.strerror
        return (f"the card was published and could not be written to the model directory: {reason}",)
    return ()
