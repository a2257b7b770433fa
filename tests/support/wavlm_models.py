"""Tiny real WavLM models with random weights, in the file format of Microsoft's unilm: `{"cfg": flat dict, "model"}`."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

unilm = pytest.importorskip("s3prl.upstream.wavlm.WavLM", reason="s3prl carries unilm's WavLM.py and is not installed")

CONVOLUTIONS = "[(32, 10, 5)] + [(32, 3, 2)] * 2 + [(32, 2, 2)]"
# the fields of the released WavLM-Base.pt's settings: `normalize` is not among them
BASE: dict[str, Any] = {
    "extractor_mode": "default",
    "encoder_layers": 2,
    "encoder_embed_dim": 64,
    "encoder_ffn_embed_dim": 96,
    "encoder_attention_heads": 4,
    "activation_fn": "gelu",
    "dropout": 0.07,
    "attention_dropout": 0.08,
    "activation_dropout": 0.09,
    "encoder_layerdrop": 0.05,
    "dropout_input": 0.03,
    "dropout_features": 0.04,
    "layer_norm_first": False,
    "conv_feature_layers": CONVOLUTIONS,
    "conv_bias": False,
    "feature_grad_mult": 0.1,
    "mask_length": 10,
    "mask_prob": 0.8,
    "mask_selection": "static",
    "mask_other": 0.0,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_channel_length": 10,
    "mask_channel_prob": 0.0,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "relative_position_embedding": True,
    "num_buckets": 32,
    "max_distance": 80,
    "gru_rel_pos": True,
    "expand_attention_head_size": -1,
}
LARGE = BASE | {"extractor_mode": "layer_norm", "layer_norm_first": True, "encoder_layers": 3, "normalize": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "wavlm_base": BASE,
    "wavlm_large": LARGE,
    "wavlm_conv_bias": LARGE | {"conv_bias": True},
    "wavlm_base_pre_norm": BASE | {"layer_norm_first": True},
    "wavlm_no_post_extract_proj": BASE | {"encoder_embed_dim": 32},
    "wavlm_relu": BASE | {"activation_fn": "relu"},
    "wavlm_other_buckets": BASE | {"num_buckets": 20, "max_distance": 40},
    "wavlm_odd_conv_pos": BASE | {"conv_pos": 15},
}
# What transformers cannot represent: the setting that is refused -> the model
REFUSED: dict[str, dict[str, Any]] = {
    "gru_rel_pos": BASE | {"gru_rel_pos": False},
    "relative_position_embedding": BASE | {"relative_position_embedding": False, "gru_rel_pos": False},
    "activation_fn": BASE | {"activation_fn": "glu"},
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """Build unilm's model in eval mode, every parameter random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = unilm.WavLM(unilm.WavLMConfig((VARIANTS | REFUSED)[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(name: str, path: Path, *, seed: int = 0, model: torch.nn.Module | None = None) -> Path:
    """Write a checkpoint as unilm released them: settings and weights, nothing else."""
    model = build(name, seed) if model is None else model
    weights = OrderedDict((key, value.detach().clone()) for key, value in model.state_dict().items())
    torch.save({"cfg": dict((VARIANTS | REFUSED)[name]), "model": weights}, path)
    return path
