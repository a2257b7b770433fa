"""The tag that names a published revision: set once, never moved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from convert.errors import ConvertError
from convert.publishing.files import LocalFile
from convert.publishing.hub import ask, text_of
from convert.publishing.remote import tree

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def find(api: HfApi, repo_id: str, tag: str) -> str | None:
    """Return the commit of a tag, `None` when there is no such tag."""

    def look() -> bool:
        return any(row.name == tag for row in api.list_repo_refs(repo_id).tags)

    if not ask(look, f"list the tags of {repo_id}", repo_id):
        return None
    # of an annotated tag, the list may name the tag's own object: ask for the commit
    return ask(lambda: text_of(api.model_info(repo_id, revision=tag).sha), f"read the tag {tag} of {repo_id}", repo_id)


def check(api: HfApi, repo_id: str, tag: str, model: Iterable[LocalFile], commit: str | None) -> str | None:
    """Return the commit a tag stands at, if it may stay there, and `None` if the tag is free.

    Args:
        api: the client.
        repo_id: the repository.
        tag: its name.
        model: the files that the tag promises.
        commit: where it would be set; `None` before there is a commit.

    Raises:
        ConvertError: with status 1: it names something else.
    """
    there = find(api, repo_id, tag)
    if there is None or there == commit:
        return there
    files = tree(api, repo_id, there)
    if all(file.name in files and files[file.name].holds(file) for file in model):
        return there
    message = f"the tag {tag} of {repo_id} names other files, at {there[:12]}; it was left there"
    raise ConvertError(message, code="tag", key=tag, status=1, hint="choose another name with --tag")


def place(api: HfApi, repo_id: str, tag: str, model: Iterable[LocalFile], commit: str, message: str) -> str:
    """Set a tag at a commit, unless it stands at the same files already; return where it stands."""
    files = tuple(model)
    there = check(api, repo_id, tag, files, commit)
    if there is not None:
        return there

    def create() -> None:
        api.create_tag(repo_id, tag=tag, tag_message=message, revision=commit, exist_ok=True)

    ask(create, f"set the tag {tag} of {repo_id}", repo_id)  # twice does no harm: exist_ok, and looked at below
    there = check(api, repo_id, tag, files, commit)
    if there is None:
        text = f"the Hub took the tag {tag} of {repo_id} and does not have it"
        raise ConvertError(text, code="tag", key=tag, hint="run it again: it sets the tag")
    return there
