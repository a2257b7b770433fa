"""Transcribes with fairseq itself: its model, its normalisation, its greedy CTC decoding."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.checkpoint import is_harmless, open_checkpoint
from convert.errors import ConvertError, Problem
from convert.evaluation.packages import require
from convert.evaluation.processes import exact
from convert.verification.devices import quiet


class FairseqReference:
    """A fairseq CTC checkpoint, opened and decoded by fairseq.

    The file's pickle is scanned before fairseq's loader may run it.

    Args:
        checkpoint: the `.pt` file.
        device: `cpu` or `cuda`.

    Raises:
        ConvertError: fairseq is missing, the file refers to more than fairseq's trainers write, or fairseq cannot open it.
    """

    def __init__(self, checkpoint: Path, device: str) -> None:
        self.torch = require("torch")
        with open_checkpoint(checkpoint) as opened:
            strange = [name for name in opened.globals if not is_harmless(name)]
            self.digest = opened.sha256()
        if strange:
            raise ConvertError(
                f"{checkpoint.name}: fairseq's loader would run code that is not known to be harmless; it was not opened",
                code="unsafe",
                problems=[
                    Problem("unsafe-global", name, "is not among what fairseq's trainers write") for name in strange
                ],
            )
        with quiet():
            fairseq = require("fairseq", "fairseq")
            utils = require("fairseq.checkpoint_utils", "fairseq")
            try:
                with _whole_pickles(self.torch):
                    (self.model,), self.settings, task = utils.load_model_ensemble_and_task([str(checkpoint)])
            except Exception as error:  # fairseq raises whatever its tasks and hydra raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                message = f"{checkpoint.name}: fairseq cannot open it: {reason}"
                raise ConvertError(message, code="fairseq", key=checkpoint.name) from error
        self.version = str(fairseq.__version__)
        self.device = device
        self.model = self.model.float().eval().to(device)
        self.dictionary: Any = getattr(task, "target_dictionary", None)
        if self.dictionary is None:
            raise ConvertError(f"{checkpoint.name}: has no dictionary to write with", code="no-vocabulary")
        self.blank = self.dictionary.index(task.blank_symbol) if hasattr(task, "blank_symbol") else 0

    def transcribe(self, samples: Any) -> str:
        """Transcribe one waveform, float32 of shape (samples,), as `fairseq.criterions.ctc` does to count errors."""
        post_process = require("fairseq.data.data_utils").post_process
        source = self.torch.from_numpy(samples)
        if self.settings.task.normalize:  # `RawAudioDataset.postprocess`
            source = self.torch.nn.functional.layer_norm(source, source.shape)
        with self.torch.no_grad(), exact():
            output = self.model(source=source[None].to(self.device), padding_mask=None)
            rows = self.model.get_normalized_probs(output, log_probs=True)[:, 0].float().cpu()
        tokens = rows.argmax(-1).unique_consecutive()
        units = self.dictionary.string(tokens[tokens != self.blank])
        symbol = getattr(self.settings.criterion, "post_process", None) or "letter"
        return str(post_process(units, symbol))


@contextmanager
def _whole_pickles(torch: Any) -> Iterator[None]:
    """Let `torch.load` take fairseq's own classes: fairseq does not say `weights_only=False`, which torch 2.6 needs."""
    load = torch.load
    torch.load = functools.partial(load, weights_only=False)
    try:
        yield
    finally:
        torch.load = load
