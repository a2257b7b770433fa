"""unilm's WavLM."""

from __future__ import annotations

from typing import Any

from .building import outer
from .reference import Reference


def build_wavlm(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build `WavLM` of Microsoft's unilm, which s3prl carries as it was released."""
    try:
        from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig
    except ImportError:
        raise ImportError("s3prl, which carries unilm's WavLM.py, is not here: pip install --no-deps s3prl")
    model = WavLM(WavLMConfig(outer(settings)))
    for layer in model.encoder.layers:
        layer.self_attn.forward = with_weights(layer.self_attn.forward)
    patches.append("torch asked for attention weights, as transformers asks for them: it multiplies otherwise then")
    return model


def with_weights(forward: Any) -> Any:
    """Ask an attention for its weights, whoever calls it."""
    return lambda *arguments, **options: forward(*arguments, **dict(options, need_weights=True))


class WavlmReference(Reference):
    """unilm's WavLM, an encoder alone."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masks_like_main = True  # it splits the mask evenly, and is asked where that agrees

    def compute(self, source: Any, padding: Any) -> Any:
        """Run the model."""
        _, mask = self.model.extract_features(source, padding_mask=padding)
        return mask


ARCHITECTURES = {"wavlm": (build_wavlm, WavlmReference)}
