"""`fairseq-to-hf convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convert import package
from convert.cli import Outcome, progress_bar
from convert.cli import command as make
from convert.commands.options import planning
from convert.report import size


@make(
    "convert",
    "fairseq-to-hf convert checkpoint_best.pt my-model",
    "fairseq-to-hf convert wav2vec_small_960h.pt my-model --dict dict.ltr.txt",
    "fairseq-to-hf convert checkpoint_best.pt my-model --dtype float16 --overwrite",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@planning
@click.option("--dtype", default="keep", type=click.Choice(list(package.DTYPES)), show_default=True)
@click.option(
    "--max-shard-size", default=package.MAX_SHARD_SIZE, show_default=True, help="Largest safetensors file, in bytes."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing model directory, once the new one is proved.")
@click.option("--allow-non-finite", is_flag=True, help="Take NaN and infinite weights. The model may be of no use.")
def command(checkpoint: Path, out: Path, **asked: Any) -> Outcome:
    """Turn a fairseq checkpoint into a Hugging Face model directory.

    Every tensor and every setting is carried over, or named with a reason, or the conversion is refused; what was written
    is read back and compared byte for byte.
    """
    with progress_bar("convert") as progress:
        done = package.convert(checkpoint, out, **asked, progress=progress)
    weights = sum(file["size"] for name, file in done.files.items() if name.endswith(".safetensors"))
    model = done.model
    lines = [
        f"{out}: {model.target}, {len(model.plan.target)} tensors, {size(weights)}, each byte read back and compared",
        f"dropped {len(model.dropped)}, made {len(model.plan.fills)}: see conversion.json",
        *(model.spoken or model.kept),
        f"next: fairseq-to-hf verify {checkpoint} {out}",
    ]
    data: dict[str, Any] = {
        "class": model.target,
        "head": model.head,
        "language": model.language,
        "languages": sorted(model.languages),
    }
    data |= {"files": done.files, "source_sha256": done.source_sha256}
    return Outcome(True, "\n".join(lines), data)
