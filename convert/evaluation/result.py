"""The result of an evaluation, and the model directory's `evaluation.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert.errors import ConvertError, Problem
from convert.evaluation.data import Dataset
from convert.evaluation.score import Scores
from convert.files import write_file
from convert.reading import read_file
from convert.report import json_bytes, parse_json

FILE = "evaluation.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Row:
    """The transcripts of one utterance.

    Args:
        index: its place in the dataset.
        name: its name in the dataset.
        digest: the SHA-256 of its samples.
        text: the reference transcript.
        hypothesis: what the model directory writes.
        fairseq: what fairseq writes, if it was run.
    """

    index: int
    name: str
    digest: str
    text: str
    hypothesis: str
    fairseq: str | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Error rates of a model directory on a dataset.

    Args:
        dataset: what was measured on.
        scores: the model directory's error rates.
        reference: fairseq's error rates, if it was run.
        rows: every utterance.
        normalizer: what was done to both texts before they were compared.
        decoder: how logits were decoded.
        command: the command line that measures the same again, without paths.
        hint: what explains a high error rate; empty when nothing does.
    """

    dataset: Dataset
    scores: Scores
    reference: Scores | None
    rows: tuple[Row, ...]
    normalizer: str
    decoder: str
    command: str
    hint: str

    @property
    def differing(self) -> tuple[Row, ...]:
        """The utterances that fairseq and the model directory transcribe differently."""
        return tuple(row for row in self.rows if row.fairseq is not None and row.fairseq != row.hypothesis)

    @property
    def ok(self) -> bool:
        """Whether no transcript differs from fairseq's; true as well when fairseq was not run."""
        return not self.differing

    @property
    def problems(self) -> tuple[Problem, ...]:
        """One for each utterance whose transcript differs."""
        return tuple(
            Problem("transcript", row.name, f"fairseq {row.fairseq!r}, transformers {row.hypothesis!r}")
            for row in self.differing
        )

    def entry(self) -> dict[str, Any]:
        """Return the entry of `evaluation.json`, which is the same on every day and machine."""
        entry: dict[str, Any] = {
            "dataset": asdict(self.dataset),
            "metrics": {"wer": self.scores.wer, "cer": self.scores.cer},
            "utterances": len(self.rows),
            "words": self.scores.words,
            "normalizer": self.normalizer,
            "decoder": self.decoder,
            "command": self.command,
        }
        if self.reference:
            entry["reference"] = {"name": "fairseq", "wer": self.reference.wer, "cer": self.reference.cer}
        return entry


def write_result(model_dir: Path, entry: dict[str, Any]) -> None:
    """Write an entry into the directory's `evaluation.json`; it replaces one of the same data, normaliser and decoder.

    Raises:
        ConvertError: `result`: the file exists and `write_result` did not write it.
    """
    results = [old for old in read_results(model_dir) if _identity(old) != _identity(entry)]
    content = json_bytes({"schema": SCHEMA, "results": sorted([*results, entry], key=_identity)})
    write_file(model_dir / FILE, content)


def read_results(model_dir: Path) -> list[dict[str, Any]]:
    """Read the entries of a model directory's `evaluation.json`; none when there is no such file.

    Raises:
        ConvertError: `result`: `write_result` did not write the file.
    """
    path = model_dir / FILE
    if not path.exists():
        return []
    try:
        found = parse_json(read_file(path), FILE)
        results: list[dict[str, Any]] = found["results"] if found["schema"] == SCHEMA else []
        identities = [_identity(result) for result in results]
    except (ConvertError, KeyError, TypeError) as error:
        raise ConvertError(f"{FILE}: not an evaluation result", code="result", key=FILE, hint="move it away") from error
    if found["schema"] != SCHEMA or len(set(identities)) != len(identities):
        message = f"{FILE}: schema {found['schema']!r}, expected {SCHEMA} with one entry for each dataset and decoder"
        raise ConvertError(message, code="result", key=FILE, hint="move it away")
    return results


def _identity(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return what makes two entries the same measurement: the data (of any revision), the normaliser, the decoder."""
    fields = [entry["dataset"][name] for name in ("type", "name", "config", "split")]
    return tuple(map(str, (*fields, entry["normalizer"], entry["decoder"])))
