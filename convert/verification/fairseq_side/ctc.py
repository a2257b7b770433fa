"""`Wav2VecCtc`: an encoder with a CTC head."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch

from .adapters import AdaptedReference
from .building import complete, encoders, fine_tuned, flat, outer
from .numerics import NAMES


def build_ctc(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `Wav2VecCtc`."""
    from fairseq.models.wav2vec import wav2vec2_asr

    task = types.SimpleNamespace(target_dictionary=range(symbols))
    if not hasattr(wav2vec2_asr, "Wav2Vec2CtcConfig"):
        normalize = bool(settings["task"].get("normalize", False))
        arguments = flat(outer(settings), normalize)
        arguments.w2v_args = flat(settings["model"]["w2v_args"]["model"], normalize)
        return wav2vec2_asr.Wav2VecCtc.build_model(arguments, task)
    return wav2vec2_asr.Wav2VecCtc.build_model(fine_tuned(settings, wav2vec2_asr.Wav2Vec2CtcConfig, ignored), task)


def blank_of(settings: Any, words: Any) -> int:
    """The id that fairseq's own `CtcCriterion` takes for its blank, with the task that a checkpoint was trained with.

    Args:
        settings: the task's.
        words: the task's dictionary.
    """
    from fairseq import tasks
    from fairseq.criterions import ctc

    task: Any = types.SimpleNamespace(target_dictionary=words)
    known = getattr(tasks, "TASK_DATACLASS_REGISTRY", {})  # since 0.12, where tasks say which symbol it is
    usual = "audio_finetuning"
    speech = {usual, "audio_pretraining", *(encoder.task for encoder in encoders().values())}
    name = settings["_name"] if settings.get("_name") in speech else usual
    if name in known:
        values = dict(complete(known[name], {}, []), fine_tuning=True)
        made = tasks.TASK_REGISTRY[name](types.SimpleNamespace(**values))
        if hasattr(made, "blank_symbol"):
            task.blank_symbol = made.blank_symbol
    if hasattr(ctc, "CtcCriterionConfig"):
        return int(ctc.CtcCriterion(ctc.CtcCriterionConfig(), task).blank_idx)
    return int(ctc.CtcCriterion(task, None, False, False, "letter").blank_idx)


class CtcReference(AdaptedReference):
    """fairseq's model with a CTC head."""

    prefix = "w2v_encoder.w2v_model."

    def encoder(self) -> Any:
        """The encoder that was pretrained, inside the model."""
        return self.model.w2v_encoder.w2v_model

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the model; the logits with the blank's weight."""
        output = self.model(source=source, padding_mask=padding, **self.adapter(source))
        logits = self.model.get_logits(output) if hasattr(self.model, "get_logits") else output["encoder_out"]
        self.seen["logits"] = logits.transpose(0, 1)
        return output["padding_mask"]

    @property
    def blank(self) -> int:
        """The blank of fairseq's own criterion, for the task that the settings name."""
        return blank_of(self.settings["task"], self.words())

    def transcribe(self, path: Any) -> str:
        """Turn a greedy path (an id for each frame) into text, as `CtcCriterion` does when it counts errors.

        Padding and the end of a sentence, which no training asks of a frame, count as blank.
        """
        from fairseq.data import data_utils

        words, blank = self.words(), self.blank
        unwritten = ("<pad>", "</s>")
        ids: Any = torch.as_tensor([blank if words.symbols[i] in unwritten else i for i in path])
        tokens = ids.unique_consecutive()
        return str(data_utils.post_process(words.string(tokens[tokens != blank]), self.request["post_process"]))

    def recognize(self, waveform: Any, rate: int) -> str:
        """Transcribe a waveform as `CtcCriterion` does when it counts errors: the best symbol of every frame."""
        from fairseq.data import data_utils

        source = self.normalise(waveform, rate)[None].to(self.device)
        with torch.no_grad(), self.lending.lent():
            output = self.model(source=source, padding_mask=None, **self.adapter(source))
            rows = self.model.get_normalized_probs(output, log_probs=True)[:, 0].float().cpu()
        self.seen = {}
        tokens = rows.argmax(-1).unique_consecutive()
        units = self.words().string(tokens[tokens != self.blank])
        return str(data_utils.post_process(units, self.request["post_process"]))

    def _filled(self, weights: Any) -> None:
        if getattr(self.model, "blank_weight", None) and self.model.blank_mode == "add":
            self.exact_blank = self._rounded_blank(weights["w2v_encoder.proj.bias"].dtype)

    def round_weights(self, name: str) -> None:
        """Round every weight to float16 or bfloat16, and keep it as float32, as a converted model of that type has it."""
        if self.exact_blank is not None:
            self.model.blank_weight = self.exact_blank = self._rounded_blank(NAMES[name])
        super().round_weights(name)

    def _rounded_blank(self, kind: Any) -> float:
        """What is left of `blank_weight` when its sum with the head's bias is rounded, as a conversion does."""
        bias = self.model.w2v_encoder.proj.bias.data[0].cpu().float()
        meant = (bias + torch.tensor(self.model.blank_weight, dtype=torch.float32)).to(kind)
        return float(meant.double() - bias.to(kind).double())

    @contextlib.contextmanager
    def as_converted(self) -> Any:
        """In float64, `blank_weight` is what is left of it once it became part of the head's bias."""
        blank = self.model.__dict__.get("blank_weight")
        if self.exact_blank is not None:
            self.model.blank_weight = self.exact_blank
        try:
            with super().as_converted():
                yield
        finally:
            if self.exact_blank is not None:
                self.model.blank_weight = blank


ARCHITECTURES = {"wav2vec_ctc": (build_ctc, CtcReference)}
