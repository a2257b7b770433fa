"""`fairseq-to-hf restore`."""

from __future__ import annotations

from pathlib import Path

import click

from convert.cli import Outcome, progress_bar
from convert.cli import command as make
from convert.restoration import restore


@make(
    "restore",
    "fairseq-to-hf restore my-model checkpoint.pt",
    "fairseq-to-hf restore my-model checkpoint.pt --overwrite",
    "fairseq-to-hf restore --json model-trained-with-transformers checkpoint.pt",
)
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.argument("out", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint, once the new one is complete.")
def command(model_dir: Path, out: Path, overwrite: bool) -> Outcome:
    """Write a fairseq checkpoint from a model directory.

    MODEL_DIR is a directory that `convert` or transformers wrote. The result loads with fairseq.
    """
    with progress_bar("restore") as progress:
        done = restore(model_dir, out, overwrite=overwrite, progress=progress)
    lines = [
        f"{out}: {done.tensors} tensors, each byte read back and compared",
        *(f"note: {note}" for note in done.notes),
    ]
    return Outcome(True, lines, {"checkpoint": str(out), "tensors": done.tensors, "notes": list(done.notes)})
