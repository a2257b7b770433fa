"""`fairseq-to-hf record`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convert.cli import Outcome, progress_bar
from convert.cli import command as make
from convert.commands.options import audio, fairseq_python, long, planning, source
from convert.report import library, quoted, size


@make(
    "record",
    "fairseq-to-hf record checkpoint_best.pt reference.safetensors",
    "fairseq-to-hf record checkpoint_best.pt reference.safetensors --fairseq-python ~/fairseq-env/bin/python",
    "fairseq-to-hf record checkpoint_best.pt reference.safetensors --audio recordings --dtype float16",
)
@source
@click.argument("out", type=click.Path(path_type=Path))
@fairseq_python
@audio
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16"]), help="Answer for weights rounded to this type too."
)
@long
@click.option("--lang", "language", metavar="LANG", help="Of several languages, the one to run. Default: all.")
@click.option("--overwrite", is_flag=True, help="Replace an existing recording, once the new one is complete.")
@planning("keep_final_proj", "language")
def command(checkpoint: str, out: Path, **options: Any) -> Outcome:
    """Run fairseq once and keep its answers, to verify later where fairseq is not installed."""
    from convert.verification import record
    from convert.verification.recording import Recorded

    with progress_bar("record") as progress:
        made = Recorded(
            record(checkpoint, out, progress=progress, doing=progress.doing if progress else None, **options)
        )
    inputs = [probe.name for probe in made.probes()]
    lines = [
        f"{out}: {library(made.about.fairseq)}, {len(inputs)} inputs, {size(out.stat().st_size)}",
        f"next: fairseq-to-hf verify {quoted(checkpoint)} MODEL_DIR --reference {quoted(out)}",
    ]
    details = dict(made.description.details)
    return Outcome(True, lines, {"inputs": inputs, "checkpoint": made.checkpoint, "reference": details})
