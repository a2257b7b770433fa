"""The evaluation as a whole: read, transcribe, run fairseq, score, and write the result."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from convert.directory import ModelDirectory
from convert.errors import ConvertError, needing
from convert.evaluation.data import Source, Utterance
from convert.evaluation.fairseq_reference import FairseqReference
from convert.evaluation.hub import hub_source
from convert.evaluation.local import folder_source, manifest_source
from convert.evaluation.options import Options
from convert.evaluation.processes import join
from convert.evaluation.recognize import Recognizer, batches, open_recognizer
from convert.evaluation.result import Evaluation, Row, write_result
from convert.evaluation.score import case_hint, score
from convert.evaluation.transcripts import Transcribe, Transcripts, default_path, key_of
from convert.loading import trying
from convert.verification.expected import hashes


@needing("evaluate")
def evaluate(
    model_dir: str | Path,
    *,
    manifest: str | Path | None = None,
    folder: str | Path | None = None,
    dataset: str | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    text_column: str | None = None,
    normalizer: str = "none",
    reference: str | None = None,
    checkpoint: str | Path | None = None,
    base: str | Path | None = None,
    language: str | None = None,
    device: str | None = None,
    batch_size: int = 8,
    transcripts: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure word and character error rate of a model directory, and write them into its `evaluation.json`.

    Weights of any precision are evaluated in float32. A transcript depends on its recording alone, not on the batch:
    padding is used only where the model masks it, and frames whose best tokens are too close for that are decided
    without padding. An interrupted run continues where it stopped. Nothing is written when transcripts differ from
    fairseq's.

    Args:
        model_dir: a directory that `convert` made, or any CTC model of transformers with its processor.
        manifest: a fairseq manifest `FILE.tsv`, with `FILE.ltr` or `FILE.wrd` beside it.
        folder: a folder of recordings with transcripts (`A.txt` beside `A.wav`, or LibriSpeech's `*.trans.txt`).
        dataset: a dataset of the Hub, or a folder that the `datasets` package can load. Exactly one of these three.
        config: the dataset's configuration, such as `clean`.
        split: the dataset's split; `test` by default.
        revision: the dataset's commit, branch or tag.
        text_column: the dataset's column of transcripts, where there are several or none of the usual names.
        normalizer: `none` compares texts as they are; `lowercase` lower-cases both sides.
        reference: `fairseq` transcribes the same recordings with fairseq too.
        checkpoint, base: the fairseq checkpoint, for `reference`, and where its settings are; as for `convert.plan`.
        language: the language to transcribe, for a model with an adapter for each of several; by default that of its weights.
        device: `cpu`, `cuda` or `cuda:N`; by default CUDA if it is available.
        batch_size: recordings in one forward pass.
        transcripts: a JSON Lines file that keeps every transcript; otherwise they are kept until the run ends.
        progress: show a bar, if stderr is a terminal.

    Returns:
        The error rates as fractions, and every transcript.

    Raises:
        ConvertError: the options exclude each other, or the model or the data cannot be used.

    Example:
        >>> evaluate("my-model", manifest="checkpoints/heldout/heldout.tsv").scores.words  # doctest: +SKIP
        57
    """
    options = Options(
        model_dir=Path(model_dir),
        manifest=_path(manifest),
        folder=_path(folder),
        dataset=dataset,
        config=config,
        split=split,
        revision=revision,
        text_column=text_column,
        normalizer=normalizer,
        reference=reference,
        checkpoint=checkpoint,
        base=base,
        language=language or "",
        device=device,
        batch_size=batch_size,
        transcripts=_path(transcripts),
    )
    return run(options, progress=progress)


def run(options: Options, *, progress: bool = False) -> Evaluation:
    """Evaluate; `evaluate` documents the options, the result and the errors."""
    import torch
    import transformers
    from tqdm import tqdm

    here = join(options.device)
    recognizer = open_recognizer(options.model_dir, here.device, options.language)
    source = _source(options, recognizer.rate)
    fairseq = _fairseq(options, here.device)
    # everything beside the samples that decides a text
    machine = (here.device.partition(":")[0], str(torch.__version__))
    model = key_of(
        *(f"{name} {digest}" for name, digest in sorted(hashes(options.model_dir).items())),
        *(options.language, recognizer.decoding, str(transformers.__version__), *machine),
    )
    other = key_of(fairseq.digest, fairseq.subject.language, fairseq.version, *machine) if fairseq else ""
    kept = Transcripts(options.transcripts or default_path(key_of(model, other, str(source.dataset))))
    finished = False
    try:
        ours = kept.of(_trying(recognizer, options.model_dir.name), framework="transformers", model=model)
        theirs = kept.of(_one_by_one(fairseq), framework="fairseq", model=other) if fairseq else None
        share = batches(source.utterances(here.rank, here.count), options.batch_size, recognizer.may_pad)
        bar = tqdm(
            _rows(share, ours, theirs),
            total=source.count and len(range(here.rank, source.count, here.count)),
            unit=" utterances",
            disable=not (progress and here.rank == 0 and sys.stderr.isatty()),
        )
        rows = tuple(sorted(here.gather(list(bar)), key=lambda row: row.index))
        if fairseq is not None:
            fairseq.close()
        finished = True
    finally:
        kept.close(remove=finished and options.transcripts is None and here.rank == 0)
    result = _result(options, source, recognizer.decoding, rows)
    if result.ok and here.rank == 0:
        write_result(options.model_dir, result.entry())
    here.wait()
    return result


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _source(options: Options, rate: int) -> Source:
    if options.manifest:
        return manifest_source(options.manifest, rate)
    if options.folder:
        return folder_source(options.folder, rate)
    return hub_source(options, rate)


def _fairseq(options: Options, device: str) -> FairseqReference | None:
    if options.checkpoint is None:
        return None
    if not os.path.lexists(options.model_dir / "conversion.json"):
        return FairseqReference(options.checkpoint, device, language=options.language, base=options.base)
    directory = ModelDirectory(options.model_dir)
    return FairseqReference(options.checkpoint, device, directory, options.language, options.base)


def _trying(recognizer: Recognizer, name: str) -> Transcribe:
    def transcribe(utterances: Sequence[Utterance]) -> list[str]:
        with trying(name, "transformers cannot transcribe with it"):
            return recognizer.transcribe(utterances)

    return transcribe


def _one_by_one(fairseq: FairseqReference) -> Transcribe:
    return lambda utterances: [fairseq.transcribe(one.samples) for one in utterances]


def _rows(share: Iterator[list[Utterance]], ours: Transcribe, theirs: Transcribe | None) -> Iterator[Row]:
    """Transcribe this process's share; rows come in the order in which they are finished."""
    for batch in share:
        for one, text in zip(batch, ours(batch), strict=True):
            yield Row(one.index, one.name, one.digest, one.text, text, theirs([one])[0] if theirs else None)


def _result(options: Options, source: Source, decoder: str, rows: tuple[Row, ...]) -> Evaluation:
    if not rows:
        raise ConvertError("the dataset has no utterances", code="no-data", hint="choose another split")
    texts, hypotheses = [row.text for row in rows], [row.hypothesis for row in rows]
    scores = score(texts, hypotheses, options.normalizer)
    compared = options.reference is not None
    content = key_of(*(part for row in rows for part in (row.name, row.digest, row.text)))
    return Evaluation(
        dataset=source.identified(content),
        scores=scores,
        reference=score(texts, [row.fairseq or "" for row in rows], options.normalizer) if compared else None,
        rows=rows,
        normalizer=options.normalizer,
        decoder=decoder,
        command=options.command(source.dataset.revision),
        hint=case_hint(texts, hypotheses, scores, options.normalizer),
    )
