"""Tiny checkpoints of every family, and their conversions, for the matrix of environments.

Each norm of each family (group norm and layer norm in the convolutions, where the family has both), heads with the large
constants of symbols that training hardly saw, and every weight of a blank that a conversion adds to the head's bias.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import classification_models
import conformer_models
import data2vec_models
import fairseq2_models
import fairseq_models
import full_size
import hubert_models
import mms_models
import seq2seq_models
import speech_to_text_models
import torch
import wavlm_models
from command_line import BUNDLED

from convert.package import convert

FAMILIES: dict[str, tuple[Any, ...]] = {
    "wav2vec2": (fairseq_models, "ctc_base", "ctc_large", "pretrained_base", "pretrained_large"),
    "hubert": (hubert_models, "hubert_base", "hubert_batch_norm", "hubert_ctc_large"),
    "data2vec": (data2vec_models, "ctc", "pretrained"),  # layer norm only
    "conformer": (conformer_models, "ctc_relative", "ctc_rotary", "ctc_relative_head_8"),
    "wavlm": (wavlm_models, "wavlm_base", "wavlm_large"),
    "mms": (mms_models, "several", "mms"),  # layer norm only
    "classification": (classification_models, "classification_base", "classification_large"),
    "seq2seq": (seq2seq_models, "learned", "large", "hubert"),
}
# one of each family, and of each norm where a family has both
FEW = (
    "wav2vec2-ctc_base",
    "wav2vec2-ctc_large",
    "wav2vec2-pretrained_base",
    "hubert-hubert_base",
    "hubert-hubert_ctc_large",
    "data2vec-ctc",
    "conformer-ctc_relative",
    "conformer-ctc_rotary",
    "wavlm-wavlm_base",
    "wavlm-wavlm_large",
    "mms-several",
    "classification-classification_base",
    "classification-classification_large",
    "seq2seq-learned",
    "speech_to_text-tied",
    "fairseq2-ctc_base",
    "fairseq2-ctc_omnilingual",
    "head-ctc_base-from_-60_to_20",
    "head-ctc_base-blank_1",
    "head-ctc_large-blank_20",
    "bundled",
)
FAIRSEQ2 = ("ctc_base", "ctc_omnilingual", "pretraining_base")
# of all symbols: from one constant to another
CONSTANTS = {
    "from_-60_to_20": (-60.0, 20.0),
    "all_-10": (-10.0, -10.0),
    "all_-60": (-60.0, -60.0),
    "all_20": (20.0, 20.0),
}
BLANKS = (1.0, 2.0, 5.0, 10.0, 20.0)


def constant_head(variant: str, low: float, high: float) -> torch.nn.Module:
    """A model whose head adds constants, as of symbols that training hardly saw."""
    model = fairseq_models.build(variant)
    with torch.no_grad():
        bias = model.w2v_encoder.proj.bias
        bias.copy_(torch.linspace(low, high, len(bias)))
    return model


Making = Callable[[Path], tuple[Path, dict[str, Any]]]  # writes into a folder; what to convert, and with which options


def _of(save: Callable[..., Path], variant: Any, **options: Any) -> Making:
    return lambda folder: (save(variant, folder / "model.pt", **options), {})


def _constant(variant: str, low: float, high: float) -> Making:
    return lambda folder: _of(fairseq_models.save, variant, model=constant_head(variant, low, high))(folder)


def _speech_to_text(variant: str, **options: str) -> Making:
    def make(folder: Path) -> tuple[Path, dict[str, Any]]:
        speech_to_text_models.save(variant, folder)
        return folder / "model.pt", {"data_config": folder / "config.yaml", **options}

    return make


def _fairseq2(variant: str) -> Making:
    return lambda folder: (fairseq2_models.save_run(variant, folder), {})


def _every() -> dict[str, Making]:
    made = {
        f"{family}-{variant}": _of(module.save, variant)
        for family, (module, *variants) in FAMILIES.items()
        for variant in variants
    }
    for variant in ("ctc_base", "ctc_large"):
        made |= {f"head-{variant}-{name}": _constant(variant, *ends) for name, ends in CONSTANTS.items()}
        for weight in BLANKS:
            tuned = {"blank_weight": weight, "blank_mode": "add"}
            blank = replace(fairseq_models.VARIANTS[variant], fine_tuned=tuned)
            made[f"head-{variant}-blank_{weight:g}"] = _of(fairseq_models.save, blank)
    made["speech_to_text-tied"] = _speech_to_text("tied")
    made["speech_to_text-to_many"] = _speech_to_text("to_many", language="de")
    made |= {f"fairseq2-{variant}": _fairseq2(variant) for variant in FAIRSEQ2}
    return made | {"bundled": lambda folder: (Path(shutil.copy(BUNDLED, folder / "model.pt")), {})}


MODELS = _every()


def make_models(work: Path, *names: str) -> None:
    """Save `checkpoints/NAME` and convert it to `models/NAME`, for some of `MODELS` or all; or for a family and a size, such as `wav2vec2-large`."""
    (work / "models").mkdir()
    for name in names or MODELS:
        folder = work / "checkpoints" / name
        folder.mkdir(parents=True)
        checkpoint, options = (
            MODELS[name](folder) if name in MODELS else (full_size.save(name, folder / "model.pt"), {})
        )
        convert(checkpoint, work / "models" / name, **options)
