"""Tiny checkpoints of every family, and their conversions, for the matrix of environments.

Each norm of each family (group norm and layer norm in the convolutions, where the family has both), heads with the large
constants of symbols that training hardly saw, and every weight of a blank that a conversion adds to the head's bias.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import classification_models
import conformer_models
import data2vec_models
import fairseq2_models
import fairseq_models
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
SPEECH_TO_TEXT = ("tied", "to_many")
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


def make_models(work: Path, *families: str) -> list[str]:
    """Save `checkpoints/NAME` and convert it to `models/NAME`: models of some families, or of all; return the names."""
    checkpoints, models = work / "checkpoints", work / "models"
    checkpoints.mkdir(parents=True)
    models.mkdir()
    made: list[str] = []

    def add(name: str, source: Path | None = None, **options: Any) -> None:
        convert(source or checkpoints / name / "model.pt", models / name, **options)
        made.append(name)

    def place(name: str) -> Path:
        (checkpoints / name).mkdir()
        return checkpoints / name / "model.pt"

    for family, (module, *variants) in FAMILIES.items():
        for variant in variants if not families or family in families else ():
            module.save(variant, place(f"{family}-{variant}"))
            add(f"{family}-{variant}")
    if not families or "heads" in families:
        for variant in ("ctc_base", "ctc_large"):
            for constants, ends in CONSTANTS.items():
                name = f"head-{variant}-{constants}"
                fairseq_models.save(variant, place(name), model=constant_head(variant, *ends))
                add(name)
            for weight in BLANKS:
                name = f"head-{variant}-blank_{weight:g}"
                tuned = {"blank_weight": weight, "blank_mode": "add"}
                fairseq_models.save(replace(fairseq_models.VARIANTS[variant], fine_tuned=tuned), place(name))
                add(name)
    for variant in SPEECH_TO_TEXT if not families or "speech_to_text" in families else ():
        folder = place(f"speech_to_text-{variant}").parent
        speech_to_text_models.save(variant, folder)
        add(folder.name, data_config=folder / "config.yaml", **({"language": "de"} if variant == "to_many" else {}))
    for variant in FAIRSEQ2 if not families or "fairseq2" in families else ():
        run = fairseq2_models.save_run(variant, checkpoints / f"fairseq2-{variant}")
        add(run.name, run)
    if not families or "bundled" in families:
        shutil.copy(BUNDLED, place("bundled"))
        add("bundled")
    return made
