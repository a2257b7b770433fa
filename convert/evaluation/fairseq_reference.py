"""Transcribes with fairseq itself: its model, its normalisation, its greedy decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.checkpoint.dictionary import Dictionary
from convert.errors import ConvertError
from convert.loading import quiet
from convert.verification.devices import without_tf32


class FairseqReference:
    """A fairseq checkpoint whose model writes text, run by fairseq.

    The file's pickle is scanned before fairseq's loader may run it.

    Args:
        checkpoint: the `.pt` file.
        device: `cpu` or `cuda`.
        kept: the dictionary that a model directory keeps, for checkpoints that carry none.
        language: what a model of several languages is to speak.

    Raises:
        ConvertError: fairseq is missing, the file refers to more than fairseq's trainers write, or fairseq cannot build it.
    """

    def __init__(self, checkpoint: Path, device: str, kept: Dictionary | None = None, language: str = "") -> None:
        from convert.verification.fairseq_side.importing import CannotBuildError
        from convert.verification.fairseq_side.opening import open_reference
        from convert.verification.subject import read_subject

        self.subject, _ = read_subject(checkpoint, kept=kept, language=language)
        if not self.subject.symbols:
            raise ConvertError(f"{checkpoint.name}: has no dictionary to write with", code="no-vocabulary")
        self.digest = self.subject.sha256
        with quiet():
            try:
                self.reference = open_reference(self.subject.request() | {"device": device})
            except CannotBuildError as error:
                hint = "install fairseq here, or leave --reference out"
                raise ConvertError(f"{checkpoint.name}: {error}", code="fairseq", hint=hint) from error
        self.version = str(self.reference.info["fairseq"])

    def transcribe(self, samples: Any) -> str:
        """Transcribe one waveform, float32 of shape (samples,), as fairseq does to count errors.

        Raises:
            ConvertError: `fairseq`: it cannot, for want of what makes the model's input.
        """
        from convert.verification.fairseq_side.importing import CannotBuildError

        try:
            with without_tf32():
                return str(self.reference.hear(samples, self.subject.rate))
        except CannotBuildError as error:
            raise ConvertError(f"{self.subject.name}: {error}", code="fairseq", hint="leave --reference out") from error
