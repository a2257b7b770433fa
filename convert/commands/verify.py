"""`fairseq-to-hf verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convert.cli import Outcome, progress_bar
from convert.cli import command as make
from convert.commands.options import audio, fairseq_python, long, planning, source


@make(
    "verify",
    "fairseq-to-hf verify checkpoint_best.pt my-model",
    "fairseq-to-hf verify checkpoint_best.pt my-model --audio recordings --plot proof.png",
    "fairseq-to-hf verify checkpoint_best.pt my-model --reference reference.safetensors",
)
@source
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "--reference", type=click.Path(path_type=Path), help="A recording of `record`: fairseq is not needed then."
)
@fairseq_python
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="cpu, cuda or cuda:N; may be repeated. Default: all there are.",
)
@audio
@click.option(
    "--require",
    type=click.Choice(["identical", "rounding"]),
    help="What every input must be. Default: identical where both sides do the same arithmetic on this CPU, else rounding.",
)
@long
@click.option(
    "--lang",
    "languages",
    multiple=True,
    metavar="LANG",
    help="Of several languages, one to run; may be repeated. Default: all.",
)
@planning(only=("dictionary", "base"))
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw the differences at every stage into a .png, .svg or .pdf file.",
)
def command(checkpoint: str, model_dir: Path, plot: Path | None, **options: Any) -> Outcome:
    """Prove that a model directory is the checkpoint's model.

    Compares every tensor byte for byte, then runs fairseq's own code and transformers on the same waveforms, stage by stage,
    and checks that deliberate mistakes are caught. Writes verification.json into the directory.
    """
    from convert.verification import verify

    if plot is not None:
        from convert.verification.plot import check

        check(plot)  # what could not be drawn is refused before the work, not after it
    with progress_bar("verify") as progress:
        done = verify(checkpoint, model_dir, progress=progress, doing=progress.doing if progress else None, **options)
    if plot is not None:
        from convert.verification.plot import plot as draw

        draw(done, plot)
    data = {key: value for key, value in done.report.items() if key not in ("schema", "problems")}
    return Outcome(done.passed, str(done), data, done.problems)
