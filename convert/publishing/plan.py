"""Decides what one commit would hold, and refuses where it would destroy somebody else's work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from convert.errors import ConvertError, Problem
from convert.publishing import card as cards
from convert.publishing.commit import Plan
from convert.publishing.facts import Facts
from convert.publishing.files import CARD, MODEL, OURS, Inventory, LocalFile
from convert.publishing.remote import TITLE, UNVERIFIED, Remote, User, was_published
from convert.report import shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True, slots=True)
class Wish:
    """How a model is to be published, as `publish` explains it."""

    public: bool
    create_pr: bool
    revision: str
    card: Literal["hub", "local"] | None
    delete_stale: bool


def may_write(user: User, repo_id: str, create_pr: bool) -> None:
    """Refuse a namespace that the user cannot write to, before anything is sent."""
    owner = repo_id.split("/")[0]
    if not create_pr and owner not in user.owners:
        message = f"{user.name} may not write to {owner}; nothing was sent"
        hint = f"publish to {user.name}/{repo_id.split('/')[1]}, or propose the change with --create-pr"
        raise ConvertError(message, code="forbidden", key=repo_id, hint=hint)


def make(api: HfApi, inventory: Inventory, facts: Facts, remote: Remote, wish: Wish) -> Plan:
    """Plan the commit on top of what stands on the Hub; its last file is the card.

    Raises:
        ConvertError: with status 1: files of another model, or a card that was edited in two places.
    """
    card = LocalFile.of_bytes(CARD, _card(api, inventory, facts, remote, wish.card))
    files = (*(inventory.files[name] for name in sorted(inventory.files)), card)
    names = {file.name for file in files}
    stale = sorted(name for name in remote.files if name not in names and MODEL.fullmatch(name))
    if stale and not wish.delete_stale:
        raise ConvertError(
            f"{facts.repo_id} holds files of another model, which would be loaded with this one; nothing was sent",
            code="stale",
            status=1,
            problems=[Problem("stale", name, "is on the Hub and not in the model directory") for name in stale],
            hint="--delete-stale deletes them in the same commit; the repository's history keeps them",
        )
    stale += sorted(name for name in remote.files if name in OURS and name not in names)
    description = (
        f"Source: {shown(facts.checkpoint)}, sha256 {shown(facts.record.source.sha256)}\n"
        f"Converted by {facts.tool}; " + ("verified: verification.json" if facts.verified else "NOT verified")
    )
    warning = "" if facts.verified else UNVERIFIED
    title = f"{warning}{TITLE}: {facts.title}"
    return Plan(facts.repo_id, files, tuple(stale), title, description, wish.create_pr, wish.public)


def _card(
    api: HfApi, inventory: Inventory, facts: Facts, remote: Remote, choice: Literal["hub", "local"] | None
) -> bytes:
    local, hub = inventory.card, remote.card
    if hub is None or local is None or hub == local or choice:
        keep = {"hub": hub, "local": local}.get(choice or "", hub)
        return cards.compose(facts, keep if keep is not None else local if hub is None else hub)
    ours, theirs = cards.compose(facts, local), cards.compose(facts, hub)
    if ours == theirs or was_published(api, facts.repo_id, remote.head or "main", LocalFile.of_bytes(CARD, local)):
        return theirs
    raise ConvertError(
        "README.md was edited both on the Hub and in the model directory; nothing was sent",
        code="card-conflict",
        key=CARD,
        status=1,
        hint="merge the two and choose one: --card local, or --card hub",
    )


def refuse_conflict(plan: Plan, first: Remote, now: Remote) -> None:
    """Refuse to write over what somebody else committed to our files since we first looked."""
    changed = [
        file.name
        for file in plan.write[:-1]
        if now.files.get(file.name) != first.files.get(file.name) and not now.holds(file)
    ]
    if changed:
        message = f"somebody else published other files to {plan.repo_id} meanwhile; nothing was committed"
        problems = [Problem("conflict", name, f"was changed in {str(now.head)[:12]}") for name in changed]
        hint = "look at that commit; run it again to publish on top of it"
        raise ConvertError(message, code="conflict", status=1, problems=problems, hint=hint)
