"""Tiny real fairseq wav2vec 2.0 models with random weights, saved the way each generation of fairseq's trainer saved them."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig, Wav2VecCtc
from fairseq.tasks import FairseqTask
from fairseq.tasks.audio_finetuning import AudioFinetuningConfig
from fairseq.tasks.audio_pretraining import AudioPretrainingConfig
from omegaconf import OmegaConf, open_dict

logging.getLogger("fairseq").setLevel(logging.ERROR)
LETTERS = list("|ETAONIHSRDLUMWCFGYPBVK'XJQZ")
CONVOLUTIONS = "[(32, 10, 5)] + [(32, 3, 2)] * 2 + [(32, 2, 2)]"
BASE: dict[str, Any] = {
    "extractor_mode": "default",
    "encoder_layers": 2,
    "encoder_embed_dim": 64,
    "encoder_ffn_embed_dim": 96,
    "encoder_attention_heads": 4,
    "conv_feature_layers": CONVOLUTIONS,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "final_dim": 24,
    "latent_vars": 10,
    "latent_groups": 2,
    "latent_dim": 16,
    "quantize_targets": True,
    "mask_prob": 0.65,
    "dropout": 0.07,
    "attention_dropout": 0.08,
    "activation_dropout": 0.09,
    "encoder_layerdrop": 0.05,
    "dropout_input": 0.03,
    "dropout_features": 0.04,
    "num_negatives": 50,
    "logit_temp": 0.15,
}
LARGE = BASE | {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True, "encoder_layers": 3}


@dataclass(frozen=True)
class Variant:
    """One model: what it is, the pretrained model's settings, the fine-tuned model's, and the task's."""

    kind: str
    encoder: dict[str, Any]
    fine_tuned: dict[str, Any] = field(default_factory=dict)
    normalize: bool = False
    plain_positions: bool = False
    symbols: tuple[str, ...] = tuple(LETTERS)
    criterion: dict[str, Any] = field(default_factory=dict)
    labels: str = "ltr"


VARIANTS: dict[str, Variant] = {
    "ctc_base": Variant("ctc", BASE),
    "ctc_large": Variant("ctc", LARGE, normalize=True),
    "ctc_base_conv_bias": Variant("ctc", BASE | {"conv_bias": True}),
    "ctc_large_no_conv_bias": Variant("ctc", LARGE | {"conv_bias": False}, normalize=True),
    "ctc_base_pre_norm": Variant("ctc", BASE | {"layer_norm_first": True}),
    "ctc_large_post_norm": Variant("ctc", LARGE | {"layer_norm_first": False}),
    "ctc_no_post_extract_proj": Variant("ctc", BASE | {"encoder_embed_dim": 32}),
    "ctc_pos_conv_plain": Variant("ctc", BASE, plain_positions=True),
    "ctc_blank_add": Variant("ctc", BASE, {"blank_weight": 1.5, "blank_mode": "add"}),
    "ctc_blank_set": Variant("ctc", LARGE, {"blank_weight": -2.5, "blank_mode": "set"}),
    "ctc_no_mask": Variant("ctc", BASE | {"mask_prob": 0.0}, {"mask_prob": 0.0, "apply_mask": False}),
    "ctc_relu": Variant("ctc", BASE | {"activation_fn": "relu"}),
    "ctc_gelu_fast": Variant("ctc", BASE | {"activation_fn": "gelu_fast"}),
    "ctc_gelu_accurate": Variant("ctc", LARGE | {"activation_fn": "gelu_accurate"}),
    "ctc_tanh": Variant("ctc", BASE | {"activation_fn": "tanh"}),
    "ctc_odd_conv_pos": Variant("ctc", BASE | {"conv_pos": 15}),
    "ctc_target_glu": Variant("ctc", BASE | {"target_glu": True}),
    "pretrained_base": Variant("pretraining", BASE),
    "pretrained_large": Variant("pretraining", LARGE | {"latent_dim": 0}, normalize=True),
    "pretrained_final_dim_0": Variant("pretraining", BASE | {"final_dim": 0, "latent_dim": 0}),
    "pretrained_no_post_extract_proj": Variant("pretraining", BASE | {"encoder_embed_dim": 32}),
    "pretrained_pos_conv_plain": Variant("pretraining", LARGE, plain_positions=True),
}
# What transformers cannot represent: the setting that is refused -> the model
REFUSED: dict[str, Variant] = {
    "pos_conv_depth": Variant("ctc", BASE | {"pos_conv_depth": 2}),
    "quantizer_depth": Variant("pretraining", BASE | {"quantizer_depth": 2}),
    "target_glu": Variant("pretraining", BASE | {"target_glu": True}),
    "quantize_input": Variant("ctc", BASE | {"quantize_input": True}),
    "crop_seq_to_multiple": Variant("ctc", BASE | {"crop_seq_to_multiple": 2}),
    "quantize_targets": Variant("pretraining", BASE | {"quantize_targets": False}),
}


def dictionary(symbols: tuple[str, ...] = tuple(LETTERS)) -> Dictionary:
    """A real fairseq dictionary."""
    made = Dictionary()
    for index, symbol in enumerate(symbols):
        made.add_symbol(symbol, n=1000 - index)
    return made


def settings(variant: Variant) -> dict[str, Any]:
    """The settings as today's trainer writes them: a plain nested dict with every field of fairseq's dataclasses."""
    common = {"sample_rate": 16000, "normalize": variant.normalize, "data": "manifests"}
    task = OmegaConf.merge(AudioPretrainingConfig(), {"_name": "audio_pretraining"} | common)
    model = OmegaConf.merge(Wav2Vec2Config(), {"_name": "wav2vec2"} | variant.encoder)
    pretrained = {"_name": None, "common": {"seed": 1, "tpu": False}, "model": model, "task": task}
    pretrained["criterion"] = {"_name": "wav2vec", "infonce": True, "loss_weights": [0.2, 10.0], "log_keys": []}
    if variant.kind == "pretraining":
        return _plain(pretrained)
    own = {"_name": "wav2vec_ctc", "w2v_path": "base.pt", "apply_mask": True, "mask_prob": 0.5, "layerdrop": 0.02}
    own |= {"mask_channel_prob": 0.1, "mask_channel_length": 8, "final_dropout": 0.01, "dropout": 0.06}
    if variant.encoder["mask_prob"] == 0:
        own["mask_channel_prob"] = 0.0
    outer = OmegaConf.merge(Wav2Vec2CtcConfig(), own | variant.fine_tuned)
    with open_dict(outer):
        outer.w2v_args = _plain(pretrained | {"criterion": None})
    labelled = {"_name": "audio_finetuning", "labels": variant.labels} | common
    criterion = {"_name": "ctc", "zero_infinity": True, "sentence_avg": True, "post_process": "letter"}
    fine_tuned = {"_name": None, "common": {"seed": 1, "tpu": False}, "model": outer}
    fine_tuned |= {"optimization": {"sentence_avg": True}, "distributed_training": {"ddp_backend": "no_c10d"}}
    fine_tuned |= {
        "task": OmegaConf.merge(AudioFinetuningConfig(), labelled),
        "criterion": criterion | variant.criterion,
    }
    return _plain(fine_tuned)


def _plain(configuration: dict[str, Any]) -> dict[str, Any]:
    """What `trainer.state_dict` does before it saves: interpolations resolved, enums as text."""
    made = OmegaConf.to_container(OmegaConf.create(configuration), resolve=True, enum_to_str=True)
    assert isinstance(made, dict)
    return made


class _Task(FairseqTask):
    """The part of a task that `Wav2VecCtc.build_model` asks for: the dictionary."""

    def __init__(self, target: Dictionary) -> None:
        super().__init__(None)
        self.target = target

    @property
    def target_dictionary(self) -> Dictionary:
        return self.target


def build(variant: Variant | str, seed: int = 0) -> torch.nn.Module:
    """Build fairseq's model in eval mode, every parameter random: norms, biases and weight norm magnitudes too."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    torch.manual_seed(seed)
    configuration = OmegaConf.create(settings(variant))
    if variant.kind == "ctc":
        model = Wav2VecCtc.build_model(configuration.model, _Task(dictionary(variant.symbols)))
    else:
        model = Wav2Vec2Model.build_model(configuration.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if variant.plain_positions:
        encoder = model.w2v_encoder.w2v_model if variant.kind == "ctc" else model
        torch.nn.utils.remove_weight_norm(encoder.encoder.pos_conv[0])
    return model.eval()


def save(
    variant: Variant | str,
    path: Path,
    *,
    layout: str = "cfg",
    container: str = "zip",
    adam: bool = False,
    seed: int = 0,
    model: torch.nn.Module | None = None,
) -> Path:
    """Write a checkpoint; `layout`, `container` and `adam` are those of `write`."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    model = build(variant, seed) if model is None else model
    task_state = {"target_dictionary": dictionary(variant.symbols)} if variant.kind == "ctc" else {}
    return write(path, model, settings(variant), task_state, layout=layout, container=container, adam=adam)


def write(
    path: Path,
    model: torch.nn.Module,
    plain: dict[str, Any],
    task_state: dict[str, Any],
    *,
    layout: str = "cfg",
    container: str = "zip",
    adam: bool = False,
) -> Path:
    """Write a checkpoint of any model as fairseq's trainer does.

    `layout`: `cfg` (plain dict, today), `omegaconf` (a DictConfig), `interpolated` (a DictConfig with `${task.normalize}`
    left in it), `namespace` (2020: flat `args`, the dictionary not in the file).
    """
    weights = OrderedDict(copy.deepcopy(model.state_dict()))  # data2vec keeps a dict among its tensors
    state: dict[str, Any] = {"args": None, "cfg": None, "model": weights, "criterion": OrderedDict()}
    state["optimizer_history"] = [
        {"criterion_name": "CtcCriterion", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 7}
    ]
    state["task_state"] = task_state
    state["extra_state"] = {"metrics": [], "previous_training_time": 1.5, "val_loss": torch.tensor(2.5)}
    state["last_optimizer_state"] = None
    if adam:
        moments = {i: {"step": 7, "exp_avg": w * 0.1, "exp_avg_sq": w * w} for i, w in enumerate(weights.values())}
        state["last_optimizer_state"] = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}
    if layout == "cfg":
        state["cfg"] = plain
    elif layout in ("omegaconf", "interpolated"):
        if layout == "interpolated" and "w2v_args" in plain["model"]:
            plain["model"]["normalize"] = "${task.normalize}"
            plain["criterion"]["sentence_avg"] = "${optimization.sentence_avg}"
        state["cfg"] = OmegaConf.create(plain)
        OmegaConf.set_struct(state["cfg"], True)
    elif layout == "namespace":
        state["args"] = _namespace(plain)
        del state["cfg"], state["task_state"]
    else:
        raise ValueError(layout)
    torch.save(state, path, _use_new_zipfile_serialization=container == "zip")
    return path


def _namespace(plain: dict[str, Any]) -> Namespace:
    """The flat `args` of 2020: model, task, criterion and trainer in one; names without their leading underscore."""
    flat = {
        "lr": [0.0005],
        "max_tokens": 1400000,
        "save_dir": "checkpoints",
        "seed": 1,
        "arch": plain["model"]["_name"],
    }
    criterion = plain["criterion"] or {"_name": "wav2vec"}
    task = str(plain["task"]["_name"]).replace("audio_finetuning", "audio_pretraining")  # its name since June 2021
    flat |= {"task": task, "criterion": criterion["_name"]}
    newer = {"blank_weight", "blank_mode", "mask_dropout", "require_same_masks", "layer_type", "pos_conv_depth"}
    for section in (plain["task"], criterion, plain["model"]):
        flat |= {
            key: value
            for key, value in section.items()
            if key not in {"_name", "w2v_args", *newer} or (value and key == "blank_weight")
        }
    if isinstance(plain["model"].get("w2v_args"), dict):
        flat["w2v_args"] = _namespace(plain["model"]["w2v_args"])
    return Namespace(**flat)


SIZES = {"encoder_layers": 1, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 8, "encoder_attention_heads": 2}


SIZES |= {"conv_feature_layers": "[(8, 10, 5)] + [(8, 3, 2)]", "conv_pos": 4, "conv_pos_groups": 2, "final_dim": 4}


WIDTHS = SIZES | {"latent_vars": 2, "latent_dim": 4}
FEW = tuple("|ETAO")
TINY = Variant("ctc", BASE | WIDTHS, symbols=FEW)  # the smallest that converts
