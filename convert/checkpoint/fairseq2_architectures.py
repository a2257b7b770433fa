"""The architectures that fairseq2 (0.4 to 0.8) and omnilingual-asr (0.2) register for wav2vec 2.0, as data.

A `.pt` of fairseq2 holds no settings. Of a released model, its asset card names an architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRETRAINED, ASR = "wav2vec2", "wav2vec2_asr"  # fairseq2's names of the two families

# fairseq2.models.wav2vec2.config.Wav2Vec2EncoderConfig
_ENCODER: dict[str, Any] = {
    "model_dim": 768,
    "max_seq_len": 4096,
    "feature_dim": 512,
    "use_fbank": False,
    "first_pass_dropout_p": 0.0,
    "layer_norm_features": True,
    "feature_extractor_layer_descs": [[512, 10, 5], *[[512, 3, 2]] * 4, *[[512, 2, 2]] * 2],
    "feature_extractor_bias": False,
    "feature_extractor_layer_norm_convs": False,
    "feature_grad_scale": 0.1,
    "num_fbank_channels": 0,
    "fbank_stride": 0,
    "sample_fbank_every_k": 0,
    "pos_encoder_type": "conv",
    "pos_encoder_depth": 1,
    "pos_conv_kernel_size": 128,
    "num_pos_conv_groups": 16,
    "use_conformer": False,
    "num_encoder_layers": 12,
    "num_encoder_attn_heads": 12,
    "ffn_inner_dim": 3072,
    "dropout_p": 0.1,
    "attn_dropout_p": 0.1,
    "ffn_inner_dropout_p": 0.0,
    "layer_drop_p": 0.05,
    "norm_order": "POST",
    "depthwise_conv_kernel_size": 0,
}
# Wav2Vec2Config
_PRETRAINED: dict[str, Any] = {
    "final_dim": 256,
    "final_proj_bias": True,
    "quantizer_encoder_grad": True,
    "temporal_mask_span_len": 10,
    "max_temporal_mask_prob": 0.69,
    "min_num_temporal_mask_spans": 2,
    "spatial_mask_span_len": 10,
    "max_spatial_mask_prob": 0.0,
    "min_num_spatial_mask_spans": 2,
    "quantized_dim": 256,
    "num_codebooks": 2,
    "num_codebook_entries": 320,
    "codebook_sampling_temperature": [2.0, 0.5, 0.999995],
    "num_distractors": 100,
    "logit_temp": 0.1,
}
# Wav2Vec2AsrConfig
_ASR: dict[str, Any] = {
    "target_vocab_size": 32,
    "final_dropout_p": 0.0,
    "use_masking": True,
    "temporal_mask_span_len": 10,
    "max_temporal_mask_prob": 0.69,
    "min_num_temporal_mask_spans": 2,
    "spatial_mask_span_len": 64,
    "max_spatial_mask_prob": 0.55,
    "min_num_spatial_mask_spans": 2,
}
# an encoder -> what it changes
_LARGE: dict[str, Any] = {
    "model_dim": 1024,
    "num_encoder_layers": 24,
    "num_encoder_attn_heads": 16,
    "ffn_inner_dim": 4096,
}
_LARGE |= {"dropout_p": 0.0, "layer_drop_p": 0.2}
_LV60K = _LARGE | {"layer_norm_features": False, "feature_extractor_bias": True, "layer_drop_p": 0.0}
_LV60K |= {"feature_extractor_layer_norm_convs": True, "norm_order": "PRE"}
_XLSR = _LV60K | {"attn_dropout_p": 0.0}
_1B = _XLSR | {"model_dim": 1280, "num_encoder_layers": 48, "ffn_inner_dim": 5120, "first_pass_dropout_p": 0.1}
_3B = _1B | {"model_dim": 2048, "num_encoder_layers": 60, "ffn_inner_dim": 8192}
_7B = _3B | {"num_encoder_layers": 128}
_FINE_TUNED = {"dropout_p": 0.0, "attn_dropout_p": 0.0, "ffn_inner_dropout_p": 0.1}
_COOLER = {"codebook_sampling_temperature": [2.0, 0.1, 0.999995]}
_UNMASKED = {"use_masking": False, "max_temporal_mask_prob": 0.0, "max_spatial_mask_prob": 0.0}


def _pretrained(encoder: Mapping[str, Any], width: int, **rest: Any) -> dict[str, Any]:
    return _ENCODER | _PRETRAINED | dict(encoder) | {"quantized_dim": width, "final_dim": width} | rest


def _asr(encoder: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    """An encoder as it is fine-tuned: in all but the base architectures, one layer in ten is left out."""
    dropped = {"layer_drop_p": 0.1} if encoder else {}
    own = {} if "use_masking" in rest else {"feature_grad_scale": 1.0}  # omnilingual-asr keeps the pretrained one's
    return _ENCODER | _ASR | dict(encoder) | _FINE_TUNED | dropped | own | rest


_ENCODERS = {"300m": _LV60K, "1b": _1B, "3b": _3B, "7b": _7B}
_TEMPORAL, _SPATIAL = "max_temporal_mask_prob", "max_spatial_mask_prob"
ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    PRETRAINED: {
        "base": _pretrained({}, 256),
        "large": _pretrained(_LARGE, 768),
        "large_lv60k": _pretrained(_LV60K, 768, **_COOLER),
        "xlsr_base": _pretrained(_XLSR, 768, **_COOLER),
        **{name: _pretrained(_ENCODERS[name], 1024, **_COOLER) for name in ("1b", "3b", "7b")},
    },
    ASR: {
        "base_10h": _asr({}),
        "base_100h": _asr({}, layer_drop_p=0.1),
        "large_10h": _asr(_LARGE, **{_TEMPORAL: 0.80, _SPATIAL: 0.30}),
        "large_100h": _asr(_LARGE, **{_TEMPORAL: 0.53, _SPATIAL: 0.55}),
        "large_lv60k_10h": _asr(_LV60K, **{_TEMPORAL: 0.80, _SPATIAL: 0.30}),
        "large_lv60k_100h": _asr(_LV60K, **{_TEMPORAL: 0.53, _SPATIAL: 0.55}),
        **{name: _asr(encoder, target_vocab_size=9812, **_UNMASKED) for name, encoder in _ENCODERS.items()},
        **{f"{name}_v2": _asr(part, target_vocab_size=10288, **_UNMASKED) for name, part in _ENCODERS.items()},
        "mms_300m_61_langs": _asr(_LV60K, target_vocab_size=2475, feature_grad_scale=1.0, **_UNMASKED),
        "mms_1B_1143_langs": _asr(_1B, target_vocab_size=3335, feature_grad_scale=1.0, **_UNMASKED),
    },
}
# omnilingual-asr normalises every waveform that its models are given
NORMALISED = {PRETRAINED: {"xlsr_base", "1b", "3b", "7b"}, ASR: {f"{n}{v}" for n in _ENCODERS for v in ("", "_v2")}}
