"""`fairseq-to-hf convert`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from convert import package
from convert.cli import Outcome, progress_bar
from convert.cli import command as make
from convert.commands.options import planning, source
from convert.errors import ConvertError
from convert.report import error_text, quoted, size


@make(
    "convert",
    "fairseq-to-hf convert checkpoint_best.pt my-model",
    "fairseq-to-hf convert wav2vec_small_960h.pt my-model --dict dict.ltr.txt",
    "fairseq-to-hf convert wav2vec2-base-960h my-model",
    "fairseq-to-hf convert hf://me/my-checkpoints/checkpoint_best.pt my-model --dtype float16 --overwrite",
)
@source
@click.argument("out", type=click.Path(path_type=Path))
@planning()
@click.option(
    "--dtype", default="keep", type=click.Choice(list(package.DTYPES)), show_default=True, help="Type of the weights."
)
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Largest safetensors file, such as 500MB.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing model directory, once the new one is complete.")
@click.option("--all", "every", is_flag=True, help="SOURCE is a folder: convert each checkpoint in it into OUT/NAME.")
@click.option("--allow-non-finite", is_flag=True, help="Accept NaN and infinite weights. The model may be useless.")
def command(checkpoint: str, out: Path, every: bool, **asked: Any) -> Outcome:
    """Turn a fairseq checkpoint into a Hugging Face model directory.

    SOURCE is a path, a name of the catalogue (fetch --list), an https address, or hf://USER/REPO/FILE.pt (of a revision:
    hf://USER/REPO@REVISION/FILE.pt). Every tensor and every setting is carried over or named with a reason; otherwise the
    conversion is refused. The result is read back and compared byte for byte.
    """
    if every:
        return _every(package.convert_all(checkpoint, out, **asked))
    with progress_bar("convert") as progress:
        done = package.convert(checkpoint, out, **asked, progress=progress)
    weights = sum(file["size"] for name, file in done.files.items() if name.endswith(".safetensors"))
    model = done.model
    given = {"--base": asked["base"] if done.based else None, "--dict": asked["dictionary"]}
    more = "".join(f" {option} {quoted(name)}" for option, name in given.items() if name)
    lines = [
        f"{out}: {model.target}, {len(model.plan.target)} tensors, {size(weights)}, each byte read back and compared",
        f"dropped {len(model.dropped)} tensors, filled {len(model.plan.fills)}: conversion.json says why",
        *(model.chosen or model.kept),
        *(f"note: {note}" for note in model.notes),
        f"next: fairseq-to-hf verify {quoted(checkpoint)} {quoted(out)}{more}",
    ]
    data: dict[str, Any] = {
        "class": model.target,
        "head": model.head,
        "language": model.language,
        "languages": sorted(model.languages),
    }
    data |= {"files": done.files, "source_sha256": done.source_sha256}
    return Outcome(True, lines, data)


def _every(done: Mapping[Path, package.Converted | ConvertError]) -> Outcome:
    lines, rows, problems = [], [], []
    for path, result in done.items():
        row: dict[str, Any] = {"checkpoint": path.name, "converted": isinstance(result, package.Converted)}
        if isinstance(result, package.Converted):
            lines.append(f"{path.name}: {result.path}: {result.model.target}")
            row |= {"out": str(result.path), "class": result.model.target}
        else:
            lines += [f"{path.name}: refused", *(f"  {line}" for line in error_text(result).splitlines() if line)]
            row |= {"code": result.code, "message": result.message, "hint": result.hint}
            problems += [replace(problem, key=f"{path.name}: {problem.key}") for problem in result.problems]
        rows.append(row)
    refused = sum(not row["converted"] for row in rows)
    lines.append(f"{len(rows) - refused} of {len(rows)} converted")
    return Outcome(not refused, "\n".join(lines), {"conversions": rows}, tuple(problems))
