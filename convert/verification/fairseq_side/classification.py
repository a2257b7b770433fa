"""`Wav2VecClassification`: an encoder with a pooled classifier."""

from __future__ import annotations

import types
from typing import Any

from .building import fine_tuned
from .ctc import CtcReference


def build_classifier(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `Wav2VecClassification`, which fairseq has since May 2023."""
    from fairseq.models.wav2vec import wav2vec2_classification as module

    task = types.SimpleNamespace(target_dictionary=range(symbols))
    configuration = fine_tuned(settings, module.Wav2Vec2ClassificationConfig, ignored)
    return module.Wav2VecClassification.build_model(configuration, task)


class ClassificationReference(CtcReference):
    """fairseq's audio classifier: the class scores of each utterance are its logits."""

    def _hook(self) -> None:
        super()._hook()
        pooling = self.model.pooling_layer

        def keep(_: Any, inputs: Any, output: Any) -> None:
            self.seen["pooled"], self.seen["logits"] = inputs[0].clone(), output.clone()

        def frames(_: Any, __: Any, output: Any) -> None:
            self.seen["projector"] = output.transpose(0, 1).clone()

        def mask(_: Any, __: Any, output: Any) -> None:
            self.padding = output["padding_mask"]

        pooling.linear.register_forward_hook(frames)
        pooling.projection.register_forward_hook(keep)
        self.model.w2v_encoder.register_forward_hook(mask)

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the model."""
        self.model(source=source, padding_mask=padding, **self.adapter(source))
        return self.padding

    def paths(self, stages: Any, frames: list[int]) -> Any:
        """The best label of each utterance."""
        return stages["logits"].float().argmax(-1).split(1)

    blank = -1  # labels have none

    def spell(self, language: str = "") -> str:
        """Name every label, in order."""
        return self.transcribe(range(len(self.request["symbols"])))

    def transcribe(self, path: Any) -> str:
        """Name labels, as fairseq's own dictionary does."""
        return " ".join(self.request["symbols"][index] for index in path)


ARCHITECTURES = {"wav2vec_classification": (build_classifier, ClassificationReference)}
