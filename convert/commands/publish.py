"""`fairseq-to-hf publish`: the command of `convert.publishing`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

from convert.cli import Outcome, Settings
from convert.cli import command as make_command
from convert.errors import ConvertError, explained
from convert.report import size

if TYPE_CHECKING:
    from convert.publishing.run import Published


@make_command(
    "publish",
    "fairseq-to-hf publish my-model me/my-model --dry-run --license mit --language en",
    "fairseq-to-hf publish my-model me/my-model --catalogue wav2vec2-base-960h --tag v1.0 --check",
    "fairseq-to-hf publish my-model their/model --create-pr",
)
@click.argument("model_dir", type=click.Path(path_type=str))
@click.argument("repo_id", metavar="USER/REPO")
@click.option("--dry-run", is_flag=True, help="Check and show everything; write nothing.")
@click.option("--public", is_flag=True, help="Create the repository public; by default it is private.")
@click.option("--create-pr", is_flag=True, help="Propose the change as a pull request, or continue your open one.")
@click.option("--revision", default="main", show_default=True, help="The branch to commit to.")
@click.option("--tag", help="The tag of the published revision; by default made of the files' hashes.")
@click.option("--check", is_flag=True, help="Load the model from the Hub afterwards and compare what it computes.")
@click.option(
    "--catalogue",
    metavar="NAME",
    help="The released checkpoint that this is: the source of license, language, data and citation.",
)
@click.option("--license", "license_", metavar="ID", help="The weights' license, such as mit.")
@click.option("--language", multiple=True, metavar="CODE", help="ISO 639 code of a language; may be repeated.")
@click.option("--dataset", "datasets", multiple=True, metavar="ID", help="Training data on the Hub; may be repeated.")
@click.option("--base-model", metavar="ID", help="The Hub model that this one was fine-tuned from.")
@click.option("--card", type=click.Choice(["hub", "local"]), help="Which README.md to keep when both were edited.")
@click.option(
    "--delete-stale", is_flag=True, help="Delete another model's files from the repository, in the same commit."
)
@click.option(
    "--timeout", default=120.0, show_default=True, metavar="SECONDS", help="Stop waiting for an answer after this time."
)
@click.option(
    "--unverified",
    is_flag=True,
    help="Publish a model that was not verified; the card, the commit and the tag say so in their first line.",
)
def command(
    model_dir: str,
    repo_id: str,
    license_: str | None,
    language: tuple[str, ...],
    datasets: tuple[str, ...],
    base_model: str | None,
    catalogue: str | None,
    card: Literal["hub", "local"] | None,
    **options: Any,
) -> Outcome:
    """Push a verified model directory to the Hub, in one commit.

    The token comes from HF_TOKEN or `hf auth login`. Exit status: 0 published or up to date, 1 refused by the gate or a
    conflict, 2 no answer (token, network).
    """
    from convert.publishing.facts import Stated
    from convert.publishing.run import publish

    settings = click.get_current_context().obj
    progress = settings.progress if isinstance(settings, Settings) else False
    stated = Stated(license_, language, datasets, base_model, catalogue)
    try:
        done = publish(model_dir, repo_id, stated=stated, card=card, progress=progress, **options)
    except KeyboardInterrupt as error:
        message = "interrupted; the commit was made completely or not at all"
        hint = "run it again: it says what is there and continues where it stopped"
        raise ConvertError(message, code="interrupted", hint=hint, status=explained(error).status) from None
    return Outcome(True, text(done), asdict(done))


def text(done: Published) -> list[str]:
    """Write what was published for people."""
    state = "verified" if done.verified else "UNVERIFIED"
    target = f"{done.repo_id}, {done.visibility}, {state}"
    if done.dry_run:
        happened = "would be published" if done.changed or done.deleted else "is up to date"
        lines = [f"dry run: {target}: {happened}; nothing was written"]
    elif done.committed:
        lines = [f"published {target}"]
    else:
        lines = [f"up to date: {target}; no commit was needed"]
    lines += [f"  {done.url}" + (f"/commit/{done.revision}" if done.revision else "")]
    lines += [f"  to {done.target}"] if done.dry_run else []
    lines += [f"  pull request {done.url}/discussions/{done.pull_request}"] if done.pull_request else []
    lines += [f"  tag {done.tag}"] if done.tag else []
    lines += ["  loaded from the Hub: computes the same"] if done.checked else []
    width = max(len(name) for name, _, _ in done.files)
    for name, count, sha256 in done.files:
        mark = "+" if name in done.changed else "="
        storage = "lfs" if name.endswith(".safetensors") or count > 10 << 20 else "regular"
        lines.append(f"  {mark} {name:{width}}  {size(count):>8}  {storage:7}  {sha256}")
    lines += [f"  - {name}" for name in done.deleted]
    lines += [f"  left out: {name}: {reason}" for name, reason in done.left_out]
    if done.unknown:
        names = ", ".join(name.replace("_", " ") for name in done.unknown)
        lines.append(f"  not known, and therefore not in the card: {names}")
    lines += [f"  note: {note}" for note in done.notes]
    lines += ["", *done.card_diff.split("\n")] if done.dry_run and done.card_diff else []
    if done.revision and not done.pull_request:
        lines += ["", f'load it with from_pretrained("{done.repo_id}", revision="{done.tag or done.revision}")']
    return lines
