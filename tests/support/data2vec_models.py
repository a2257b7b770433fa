"""Tiny real fairseq data2vec audio models with random weights, saved as fairseq's trainer saves them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fairseq.examples.data2vec.models.data2vec_audio import Data2VecAudioConfig, Data2VecAudioModel
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from fairseq.models.wav2vec.wav2vec2_asr import Wav2VecCtc
from fairseq_models import BASE as WAV2VEC2
from fairseq_models import Variant, _plain, _Task, dictionary, write
from fairseq_models import settings as wav2vec2_settings
from omegaconf import OmegaConf

BASE: dict[str, Any] = WAV2VEC2 | {
    "extractor_mode": "layer_norm",
    "layer_norm_first": False,
    "final_dim": 0,
    "latent_dim": 256,
    "conv_pos": 15,
    "pos_conv_depth": 5,  # kernels of 3
    "ema_decay": 0.9,
    "instance_norm_target_layer": True,
    "average_top_k_layers": 1,
}
VARIANTS: dict[str, Variant] = {
    "ctc": Variant("ctc", BASE, normalize=True),
    "ctc_depth_2": Variant("ctc", BASE | {"pos_conv_depth": 2, "conv_pos": 9}, normalize=True),  # kernels of 4
    "ctc_depth_3": Variant("ctc", BASE | {"pos_conv_depth": 3}, normalize=True),  # kernels of 5
    "ctc_depth_4": Variant("ctc", BASE | {"pos_conv_depth": 4, "conv_pos": 8}, normalize=True),  # 2 becomes 3
    "ctc_conv_bias": Variant("ctc", BASE | {"conv_bias": True}, normalize=True),
    "ctc_equal_widths": Variant("ctc", BASE | {"encoder_embed_dim": 32}, normalize=True),  # keeps post_extract_proj
    "ctc_relu": Variant("ctc", BASE | {"activation_fn": "relu"}, normalize=True),
    "ctc_blank_add": Variant("ctc", BASE, {"blank_weight": 1.5, "blank_mode": "add"}, normalize=True),
    "ctc_no_mask": Variant("ctc", BASE | {"mask_prob": 0.0}, {"mask_prob": 0.0, "apply_mask": False}, normalize=True),
    "ctc_not_normalized": Variant("ctc", BASE),
    "pretrained": Variant("pretraining", BASE, normalize=True),
    "pretrained_depth_3": Variant("pretraining", BASE | {"pos_conv_depth": 3}, normalize=True),
}
# What Data2VecAudioModel cannot represent: the setting that is refused -> the model
REFUSED: dict[str, Variant] = {
    "extractor_mode": Variant("ctc", BASE | {"extractor_mode": "default"}),
    "layer_norm_first": Variant("pretraining", BASE | {"layer_norm_first": True}),
    "pos_conv_depth": Variant("ctc", BASE | {"pos_conv_depth": 1}),
    "layer_type": Variant("ctc", BASE, {"layer_type": "trf_adp", "adp_num": 1, "adp_dim": 8, "adp_trf_idx": "all"}),
}
# What fairseq never released the code of, as it stands in the released pretrained files
# (https://github.com/facebookresearch/fairseq/issues/4678)
RELEASED = {"fixup_init": False, "no_ln": False, "attention_layer_norm": False, "conv_feature_no_norm_on_1d": True}
RELEASED |= {"pct_holes": 0.0}


def settings(variant: Variant) -> dict[str, Any]:
    """The settings as today's trainer writes them: every field of fairseq's dataclasses."""
    shared = {key: value for key, value in variant.encoder.items() if key in Wav2Vec2Config.__dataclass_fields__}
    made = wav2vec2_settings(replace(variant, encoder=shared))
    pretrained = made if variant.kind == "pretraining" else made["model"]["w2v_args"]
    model = OmegaConf.merge(Data2VecAudioConfig(), {"_name": "data2vec_audio"} | variant.encoder)
    pretrained |= _plain({"model": model, "optimization": {"max_update": 400_000}})
    if variant.kind == "pretraining":
        pretrained["criterion"] = {"_name": "model", "loss_weights": {}, "log_keys": ["ema_decay", "target_var"]}
    return made


def build(variant: Variant | str, seed: int = 0) -> torch.nn.Module:
    """Build fairseq's model in eval mode, every parameter random."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    torch.manual_seed(seed)
    configuration = OmegaConf.create(settings(variant))
    if variant.kind == "ctc":
        model = Wav2VecCtc.build_model(configuration.model, _Task(dictionary(variant.symbols)))
    else:
        model = Data2VecAudioModel.build_model(configuration.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(
    variant: Variant | str,
    path: Path,
    *,
    model: torch.nn.Module | None = None,
    seed: int = 0,
    teacher: bool = True,
    released: bool = False,
    **options: Any,
) -> Path:
    """Write a checkpoint; further options are those of `fairseq_models.write`.

    `teacher`: with the teacher of the pretraining, which fairseq's trainer leaves as a dict in the middle of the tensors.
    `released`: with the settings and the names that only the released pretrained files have.
    """
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    model = build(variant, seed) if model is None else model
    if variant.kind == "pretraining" and teacher:
        model.set_num_updates(7)
    task_state = {"target_dictionary": dictionary(variant.symbols)} if variant.kind == "ctc" else {}
    write(path, model, settings(variant), task_state, **options)
    if released:
        state = torch.load(path, weights_only=False)
        pretrained = state["cfg"] if variant.kind == "pretraining" else state["cfg"]["model"]["w2v_args"]
        pretrained["model"] |= RELEASED
        renamed = {"final_proj.weight": "final_proj.0.weight", "final_proj.bias": "final_proj.0.bias"}
        state["model"] = OrderedDict((renamed.get(key, key), value) for key, value in state["model"].items())
        torch.save(state, path)
    return path
