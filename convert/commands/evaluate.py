"""`fairseq-to-hf evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convert.cli import Outcome
from convert.cli import command as make
from convert.evaluation.processes import is_main
from convert.evaluation.result import FILE, Evaluation
from convert.evaluation.run import evaluate
from convert.evaluation.score import NORMALIZERS

FILE_OPTION = click.Path(path_type=Path)


@make(
    "evaluate",
    "fairseq-to-hf evaluate my-model --manifest data/test.tsv",
    "fairseq-to-hf evaluate my-model --manifest data/test.tsv --reference fairseq --checkpoint checkpoint_best.pt",
    "fairseq-to-hf evaluate my-model --dataset openslr/librispeech_asr --config clean",
)
@click.argument("model_dir", type=FILE_OPTION)
@click.option("--manifest", type=FILE_OPTION, help="A fairseq manifest, FILE.tsv with FILE.ltr or FILE.wrd beside it.")
@click.option("--folder", type=FILE_OPTION, help="Recordings with .txt files beside them, or LibriSpeech's folders.")
@click.option("--dataset", help="A dataset of the Hub, or a folder that the datasets package can load.")
@click.option("--config", help="The dataset's configuration.")
@click.option("--split", help="The dataset's split. [default: test]")
@click.option("--revision", help="The dataset's commit, branch or tag.")
@click.option(
    "--text-column", help="The dataset's column of transcripts, where its name is unusual or not the only usual one."
)
@click.option(
    "--normalizer",
    default="none",
    show_default=True,
    type=click.Choice(list(NORMALIZERS)),
    help="Applied to both texts before they are compared.",
)
@click.option(
    "--reference",
    type=click.Choice(["fairseq"]),
    help="Transcribe with fairseq too; exit status 1 if any transcript differs.",
)
@click.option("--checkpoint", metavar="SOURCE", help="The fairseq checkpoint, for --reference.")
@click.option("--base", metavar="SOURCE", help="Where its settings are, as for convert.")
@click.option(
    "--lang", "language", metavar="LANG", help="Of several languages, the one to transcribe. [default: the weights']"
)
@click.option("--device", help="cpu, cuda or cuda:N. [default: cuda if available]")
@click.option(
    "--batch-size", default=8, show_default=True, help="Recordings in one forward pass; no transcript depends on it."
)
@click.option("--transcripts", type=FILE_OPTION, help="Keep every transcript in this .jsonl file.")
def command(model_dir: Path, **asked: Any) -> Outcome:
    """Measure the word error rate of a model directory.

    Writes the result into MODEL_DIR/evaluation.json, which `publish` reads. An interrupted run continues where it
    stopped. `accelerate launch` shares the work among devices; the numbers stay the same.
    """
    context = click.get_current_context()
    result = evaluate(model_dir, **asked, progress=context.obj.progress)
    if not is_main():
        context.exit(0 if result.ok else 1)
    differing = [{"name": row.name, "fairseq": row.fairseq, "transformers": row.hypothesis} for row in result.differing]
    data = {"result": result.entry(), "differing": differing, "hint": result.hint}
    return Outcome(result.ok, _text(result), data, result.problems)


def _text(result: Evaluation) -> list[str]:
    data = result.dataset
    name = ", ".join(part for part in (data.name, data.config, data.split) if part)
    rates = [("transformers", result.scores)] + ([("fairseq", result.reference)] if result.reference else [])
    lines = [
        f"{name}: {len(result.rows)} utterances, {result.scores.words} words; {result.decoder}; "
        f"normalizer {result.normalizer}",
        *(f"{label:<12}  WER {scores.wer:8.3%}  CER {scores.cer:8.3%}" for label, scores in rates),
    ]
    if result.reference:
        lines.append(f"transcripts that differ: {len(result.differing)} of {len(result.rows)}")
        for row in result.differing:
            lines += [f"  {row.name}", f"    fairseq       {row.fairseq}", f"    transformers  {row.hypothesis}"]
    lines.append(f"written: {FILE}" if result.ok else f"{FILE} was not written")
    return lines + ([f"hint: {result.hint}"] if result.hint else [])
