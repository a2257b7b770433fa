"""Measures the error rates of a model directory: reads, transcribes, asks fairseq, scores, and writes the result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from convert.errors import ConvertError
from convert.evaluation.data import Source, Utterance
from convert.evaluation.fairseq_reference import FairseqReference
from convert.evaluation.journal import Journal, default_path, key_of
from convert.evaluation.packages import require
from convert.evaluation.processes import Processes, join
from convert.evaluation.recognize import Recognizer, batches, model_digest, open_recognizer
from convert.evaluation.request import Request
from convert.evaluation.result import Evaluation, Row, write_result
from convert.evaluation.score import case_hint, score
from convert.model.directory import ModelDirectory


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
    spoken: str | None = None,
    device: str | None = None,
    batch_size: int = 8,
    transcripts: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure word and character error rate of a model directory, and write them into its `evaluation.json`.

    Weights of any precision are evaluated in float32. A transcript depends on its recording alone, not on the batch:
    padding is used only where the model masks it, and frames whose best tokens are too close for that are decided
    without padding. An interrupted run goes on where it stopped. Nothing is written when transcripts differ from
    fairseq's.

    Args:
        model_dir: a directory that `convert` made, or any CTC model of transformers with its processor.
        manifest: a fairseq manifest `FILE.tsv`, with `FILE.ltr` or `FILE.wrd` beside it.
        folder: a folder of recordings with transcripts (`A.txt` beside `A.wav`, or LibriSpeech's `*.trans.txt`).
        dataset: a dataset of the Hub, or a folder that the `datasets` package can load. Exactly one of these three.
        config: the dataset's configuration, such as `clean`.
        split: the dataset's split; `test` by default.
        revision: the dataset's commit, branch or tag.
        text_column: the dataset's column of transcripts, where that is not plain.
        normalizer: `none` compares texts as they stand; `lowercase` lower-cases both sides.
        reference: `fairseq` transcribes the same recordings with fairseq too.
        checkpoint: the fairseq checkpoint, for `reference`.
        spoken: the language to speak, of a model with an adapter for each of several; by default the one of its weights.
        device: `cpu`, `cuda` or `cuda:N`; CUDA where it is there, by default.
        batch_size: recordings in one forward pass.
        transcripts: a JSON Lines file that keeps every transcript; otherwise they are kept until the run ends.
        progress: show a bar, if stderr is a terminal.

    Returns:
        The error rates as fractions, and every transcript.

    Raises:
        ConvertError: the options do not go together, or the model, the data or a package cannot be used.

    Example:
        >>> evaluate("my-model", manifest="checkpoints/heldout/heldout.tsv").scores.words  # doctest: +SKIP
        57
    """
    request = Request(
        Path(model_dir),
        _path(manifest),
        _path(folder),
        dataset,
        config,
        split,
        revision,
        text_column,
        normalizer,
        reference,
        _path(checkpoint),
        spoken,
    )
    if batch_size < 1:
        raise ConvertError(f"batch size {batch_size}, expected at least 1", code="usage", key="batch-size")
    here = join(device)
    recognizer = open_recognizer(request.model_dir, here.device, request.spoken or "")
    source = request.source(recognizer.rate)
    fairseq = (
        _fairseq(request.checkpoint, request.model_dir, here.device, request.spoken or "")
        if request.checkpoint
        else None
    )
    keys = _Keys(
        model_digest(request.model_dir) + (request.spoken or ""),
        recognizer.decoding,
        here.device.partition(":")[0],
        fairseq,
    )
    run = key_of(keys.model, keys.fairseq, str(source.dataset))
    journal = Journal(_path(transcripts) or default_path(run))
    finished = False
    try:
        work = _transcribe(recognizer, source, batch_size, fairseq, keys, journal, here)
        bar = require("tqdm").tqdm(
            work,
            total=source.count and len(range(here.rank, source.count, here.count)),
            unit=" utterances",
            disable=not (progress and here.rank == 0 and sys.stderr.isatty()),
        )
        rows = tuple(sorted(here.gather(list(bar)), key=lambda row: row.index))
        if fairseq is not None:
            fairseq.close()
        finished = True
    finally:
        journal.close(remove=finished and transcripts is None and here.rank == 0)
    if not rows:
        raise ConvertError("the dataset holds no utterance", code="no-data")
    texts, heard = [row.text for row in rows], [row.hypothesis for row in rows]
    scores = score(texts, heard, normalizer)
    result = Evaluation(
        dataset=source.described(_content(rows)),
        scores=scores,
        reference=score(texts, [row.fairseq or "" for row in rows], normalizer) if fairseq else None,
        rows=rows,
        normalizer=normalizer,
        decoder=recognizer.decoding,
        command=request.command(source.dataset.revision),
        hint=case_hint(texts, heard, scores, normalizer),
    )
    if result.ok and here.rank == 0:
        write_result(request.model_dir, result.entry())
    here.wait()
    return result


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _fairseq(checkpoint: Path, model_dir: Path, device: str, language: str) -> FairseqReference:
    """Open the checkpoint as it was converted."""
    if not (model_dir / "conversion.json").is_file():
        return FairseqReference(checkpoint, device, language=language)
    return FairseqReference(checkpoint, device, ModelDirectory(model_dir), language)


def _content(rows: tuple[Row, ...]) -> str:
    """The SHA-256 over names, samples and transcripts of a dataset."""
    return key_of(*(part for row in rows for part in (row.name, row.digest, row.text)))


class _Keys:
    """Names for answers: of everything that decides a transcript."""

    def __init__(self, digest: str, decoder: str, device: str, fairseq: FairseqReference | None) -> None:
        torch, transformers = require("torch"), require("transformers")
        common = (device, str(torch.__version__))
        self.model = key_of("transformers", digest, decoder, str(transformers.__version__), *common)
        self.fairseq = (
            key_of("fairseq", fairseq.digest + fairseq.subject.language, fairseq.version, *common) if fairseq else ""
        )


def _transcribe(
    recognizer: Recognizer,
    source: Source,
    batch_size: int,
    fairseq: FairseqReference | None,
    keys: _Keys,
    journal: Journal,
    here: Processes,
) -> Iterator[Row]:
    """Transcribe this process's share; rows come in the order in which they are finished."""
    for batch in batches(source.utterances(here.rank, here.count), batch_size, recognizer.may_pad):
        digests = [utterance.digest() for utterance in batch]
        names = [key_of(keys.model, digest) for digest in digests]
        new = [(key, utterance) for key, utterance in zip(names, batch, strict=True) if journal.find(key) is None]
        if new:
            heard = recognizer.transcribe([utterance for _, utterance in new])
            journal.add(
                _record(key, "transformers", utterance, text) for (key, utterance), text in zip(new, heard, strict=True)
            )
        for digest, key, utterance in zip(digests, names, batch, strict=True):
            other = None
            if fairseq:
                fairseq_key = key_of(keys.fairseq, digest)
                other = journal.find(fairseq_key)
                if other is None:
                    other = fairseq.transcribe(utterance.samples)
                    journal.add([_record(fairseq_key, "fairseq", utterance, other)])
            yield Row(utterance.index, utterance.name, digest, utterance.text, journal.find(key) or "", other)


def _record(key: str, framework: str, utterance: Utterance, text: str) -> dict[str, str]:
    return {
        "key": key,
        "framework": framework,
        "name": utterance.name,
        "reference": utterance.text,
        "hypothesis": text,
    }
