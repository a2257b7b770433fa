"""Models of released sizes, of every family, as fairseq initialises them: the trained ones cannot be had here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conformer_models
import data2vec_models
import fairseq_models
import hubert_models
import pytest
import torch
import wavlm_models

CONVOLUTIONS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
COMMON: dict[str, Any] = {"conv_feature_layers": CONVOLUTIONS, "conv_pos": 128, "conv_pos_groups": 16}
SIZES: dict[str, dict[str, Any]] = {
    "base": COMMON
    | {"encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12}
    | {"final_dim": 256},
    "large": COMMON
    | {"encoder_layers": 24, "encoder_embed_dim": 1024, "encoder_ffn_embed_dim": 4096, "encoder_attention_heads": 16}
    | {"final_dim": 768},
    "xlarge": COMMON  # HuBERT's, and XLS-R's of 1B
    | {"encoder_layers": 48, "encoder_embed_dim": 1280, "encoder_ffn_embed_dim": 5120, "encoder_attention_heads": 16}
    | {"final_dim": 1024},
}


@contextmanager
def as_initialised() -> Iterator[None]:
    """Let the builders of tiny models add nothing to what fairseq initialises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        yield


def _wav2vec2(size: str, path: Path) -> Path:
    encoder = (fairseq_models.BASE if size == "base" else fairseq_models.LARGE) | SIZES[size]
    return fairseq_models.save(fairseq_models.Variant("ctc", encoder, normalize=size != "base"), path)


def _hubert(size: str, path: Path) -> Path:
    encoder = (hubert_models.BASE if size == "base" else hubert_models.LARGE) | SIZES[size]
    return hubert_models.save(hubert_models.Variant("hubert", encoder, normalize=size != "base"), path)


def _data2vec(size: str, path: Path) -> Path:
    encoder = data2vec_models.BASE | SIZES[size] | {"conv_pos": 95, "final_dim": 0}
    return data2vec_models.save(fairseq_models.Variant("ctc", encoder, normalize=True), path)


def _conformer(size: str, path: Path) -> Path:
    encoder = (conformer_models.RELATIVE if size == "base" else conformer_models.ROTARY) | SIZES[size]
    encoder |= {"depthwise_conv_kernel_size": 31}
    variant = fairseq_models.Variant("ctc", encoder, conformer_models.TUNED, normalize=size != "base")
    return conformer_models.save(variant, path)


def _wavlm(size: str, path: Path) -> Path:
    settings = (wavlm_models.BASE if size == "base" else wavlm_models.LARGE) | SIZES[size]
    settings = {key: value for key, value in settings.items() if key != "final_dim"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(wavlm_models.VARIANTS, size, settings | {"num_buckets": 320, "max_distance": 800})
        return wavlm_models.save(size, path)


FAMILIES: dict[str, Callable[[str, Path], Path]] = {
    "wav2vec2": _wav2vec2,
    "hubert": _hubert,
    "data2vec": _data2vec,
    "conformer": _conformer,
    "wavlm": _wavlm,
}


def save(name: str, path: Path) -> Path:
    """Write a checkpoint, such as `wav2vec2-large`: a family and a size."""
    family, _, size = name.partition("-")
    with as_initialised():
        return FAMILIES[family](size, path)
