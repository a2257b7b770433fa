"""Transcription with fairseq itself: its model, its normalisation, its greedy decoding."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from convert.audio import Waveform
from convert.directory import ModelDirectory
from convert.errors import ConvertError
from convert.loading import quiet
from convert.request import Options, request_again
from convert.sources import dictionary_beside, open_source
from convert.verification.devices import without_tf32


class FairseqReference:
    """A fairseq checkpoint whose model writes text, run by fairseq; close it to know that the file stayed the same.

    Args:
        checkpoint: the checkpoint, as for `convert.plan`.
        device: `cpu` or `cuda`.
        directory: the model directory that it was converted to, which knows how, and may keep the dictionary.
        language: the one of several to transcribe; by default the one that the directory's weights are of.
        base: as for `convert.plan`.

    Raises:
        ConvertError: the checkpoint cannot be converted; fairseq is missing, or cannot build the model.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str,
        directory: ModelDirectory | None = None,
        language: str = "",
        base: str | Path | None = None,
    ) -> None:
        from convert.verification.fairseq_side.importing import CannotBuildError
        from convert.verification.fairseq_side.opening import open_reference
        from convert.verification.reference import answering
        from convert.verification.subject import read_subject

        with contextlib.ExitStack() as stack:
            opening = directory.record.asked.opening if directory else {}
            opened = stack.enter_context(open_source(checkpoint, base=base, **opening))
            stack.enter_context(opened.unchanged())
            opened.check_bytes()
            name = opened.path.name
            beside = dictionary_beside(opened)
            request = request_again(directory, opened) if directory else Options(dictionary=beside).request()
            taken = language or (directory.record.language if directory else "")
            self.subject, _ = read_subject(opened, replace(request, language=taken))
            if not self.subject.symbols:
                hint = "`fairseq-to-hf verify` compares any model with fairseq's"
                raise ConvertError(f"{name} has no dictionary: it writes no text", code="no-vocabulary", hint=hint)
            self.digest = self.subject.sha256
            with answering(), quiet():
                try:
                    self.reference = open_reference(self.subject.request() | {"device": device})
                except CannotBuildError as error:
                    hint = "install fairseq here, or leave --reference out"
                    raise ConvertError(f"{name}: {error}", code="fairseq", hint=hint) from error
            self.version = str(self.reference.info["fairseq"])
            self.close = stack.pop_all().close

    def transcribe(self, samples: Waveform) -> str:
        """Transcribe one waveform, float32 of shape (samples,), as fairseq does to count errors.

        Raises:
            ConvertError: `fairseq`: it cannot, for want of what makes the model's input.
        """
        from convert.verification.fairseq_side.importing import CannotBuildError
        from convert.verification.reference import answering

        with answering(), without_tf32():
            try:
                return str(self.reference.recognize(samples, self.subject.rate))
            except CannotBuildError as error:
                hint = "leave --reference out"
                raise ConvertError(f"{self.subject.name}: {error}", code="fairseq", hint=hint) from error
