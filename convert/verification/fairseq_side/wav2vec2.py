"""wav2vec 2.0 as it was pretrained."""

from __future__ import annotations

from .building import build_pretrained
from .reference import Reference

ENCODERS = {"wav2vec2": ("fairseq.models.wav2vec.wav2vec2", "Wav2Vec2Config", "Wav2Vec2Model")}
ARCHITECTURES = {"wav2vec2": (build_pretrained, Reference)}
