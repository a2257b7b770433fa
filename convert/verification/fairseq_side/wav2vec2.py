"""wav2vec 2.0, and what its pretraining computes after the encoder."""

from __future__ import annotations

from typing import Any

from .building import Encoder
from .numerics import same
from .reference import Reference


class Wav2Vec2Reference(Reference):
    """wav2vec 2.0, alone or inside of another model."""

    def _hook(self) -> None:
        super()._hook()
        if self.w2v.quantizer is not None:
            self._watch(self.w2v.quantizer.weight_proj, "quantizer", same)

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the model, and of a pretrained one what `Wav2Vec2Model.forward` computes then, for every frame."""
        mask = super().compute(source, padding)
        if self.w2v.quantizer is not None:
            features = self.seen["feature_norm"]
            quantized = self.w2v.quantizer(features, produce_targets=True)
            self.seen["quantizer"] = self.seen["quantizer"].reshape(features.shape[0], features.shape[1], -1)
            self.seen["codes"] = quantized["targets"]
            self.seen["project_q"] = self.w2v.project_q(quantized["x"])
            self.seen["project_hid"] = self.w2v.final_proj(self.seen["encoder"])
        return mask


ENCODERS = {
    "wav2vec2": Encoder(
        "fairseq.models.wav2vec.wav2vec2",
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        Wav2Vec2Reference,
        "audio_pretraining",
        {},
    )
}
