"""Conformer encoders, which fairseq main cannot build as it is."""

from __future__ import annotations

import contextlib
from typing import Any


@contextlib.contextmanager
def patched(patches: list[str]) -> Any:
    """Let fairseq main build and run a `ConformerEncoder`.

    Since there are adapter layers, `TransformerEncoder` hands `layer_idx` and `corpus_key`, which are for those alone, to
    methods that `ConformerEncoder` replaces with its own, which take neither. A class that ignores them stands in its place.
    """
    from fairseq.models.wav2vec import wav2vec2

    original = getattr(wav2vec2, "ConformerEncoder", None)
    if original is None:
        yield
        return
    patch = (
        "layer_idx and corpus_key, which are for adapter layers, ignored by ConformerEncoder: its methods take neither"
    )

    class ConformerEncoder(original):  # type: ignore[misc, valid-type]
        def build_encoder_layer(self, args: Any, layer_idx: Any = None) -> Any:
            if layer_idx is not None and patch not in patches:
                patches.append(patch)
            return super().build_encoder_layer(args)

        def extract_features(
            self, x: Any, padding_mask: Any = None, tgt_layer: Any = None, corpus_key: Any = None
        ) -> Any:
            return super().extract_features(x, padding_mask, tgt_layer)

    wav2vec2.ConformerEncoder = ConformerEncoder
    try:
        yield
    finally:
        wav2vec2.ConformerEncoder = original
