"""One small model of each kind, for whatever has to hold for all of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import classification_models
import conformer_models
import data2vec_models
import fairseq_models
import hubert_models
import mms_models
import seq2seq_models
import speech_to_text_models
import torch
import wavlm_models
from command_line import BUNDLED
from verify_models import converted

from convert.package import convert

MODELS: dict[str, tuple[Any, ...]] = {
    "wav2vec2": (fairseq_models, "ctc_base", "ctc_large", "pretrained_base", "pretrained_large"),
    "hubert": (hubert_models, "hubert_base", "hubert_ctc_large"),
    "data2vec": (data2vec_models, "ctc"),
    "conformer": (conformer_models, "ctc_relative", "ctc_rotary"),
    "wavlm": (wavlm_models, "wavlm_base", "wavlm_large"),
    "mms": (mms_models, "several"),
    "classification": (classification_models, "classification_base", "classification_large"),
    "seq2seq": (seq2seq_models, "learned"),
}
CONSTANTS = {"from_-60_to_20": (-60.0, 20.0), "all_-30": (-30.0, -30.0)}
BLANKS = (1.0, 20.0)


def constant_head(low: float, high: float) -> torch.nn.Module:
    """A model whose head adds constants, as of symbols that training hardly saw."""
    model = fairseq_models.build("ctc_base")
    with torch.no_grad():
        bias = model.w2v_encoder.proj.bias
        bias.copy_(torch.linspace(low, high, len(bias)))
    return model


def make_models(folder: Path) -> Path:
    """Save and convert a model of each kind: each norm of each family, heads with large constants, and the bundled one."""
    models = folder / "models"
    models.mkdir()
    for family, (module, *variants) in MODELS.items():
        for variant in variants:
            converted(variant, models, f"{family}-{variant}", write=module.save)
    for name, ends in CONSTANTS.items():
        converted("ctc_base", models, f"head-{name}", model=constant_head(*ends))
    for weight in BLANKS:
        blank = replace(fairseq_models.VARIANTS["ctc_base"], fine_tuned={"blank_weight": weight, "blank_mode": "add"})
        converted(blank, models, f"blank-{weight:g}")
    speech_to_text_models.save("tied", models)
    checkpoint = (models / "model.pt").rename(models / "speech_to_text.pt")
    described = (models / "config.yaml").rename(models / "speech_to_text.yaml")
    convert(checkpoint, models / "speech_to_text", data_config=described)
    shutil.copy(BUNDLED, models / "bundled.pt")
    convert(models / "bundled.pt", models / "bundled")
    return folder
