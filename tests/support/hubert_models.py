"""Tiny real fairseq HuBERT models with random weights, saved the way fairseq's trainer saves them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.models.hubert.hubert_asr import HubertCtc, HubertCtcConfig
from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig, HubertPretrainingTask
from fairseq_models import CONVOLUTIONS, LETTERS, _plain, dictionary, write
from omegaconf import OmegaConf, open_dict

BASE: dict[str, Any] = {
    "label_rate": 50.0,
    "extractor_mode": "default",
    "encoder_layers": 2,
    "encoder_embed_dim": 64,
    "encoder_ffn_embed_dim": 96,
    "encoder_attention_heads": 4,
    "conv_feature_layers": CONVOLUTIONS,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "final_dim": 24,
    "mask_prob": 0.8,
    "dropout": 0.07,
    "attention_dropout": 0.08,
    "activation_dropout": 0.09,
    "encoder_layerdrop": 0.05,
    "dropout_input": 0.03,
    "dropout_features": 0.04,
    "logit_temp": 0.15,
    "untie_final_proj": True,  # hubert_base_librispeech.yaml
}
LARGE = BASE | {
    "extractor_mode": "layer_norm",
    "layer_norm_first": True,
    "encoder_layers": 3,
    "untie_final_proj": False,
}


@dataclass(frozen=True)
class Variant:
    """One model: what it is, the pretrained model's settings, the fine-tuned model's, and the tasks'."""

    kind: str
    encoder: dict[str, Any]
    fine_tuned: dict[str, Any] = field(default_factory=dict)
    normalize: bool = False
    plain_positions: bool = False
    clusters: tuple[int, ...] = (20,)
    symbols: tuple[str, ...] = tuple(LETTERS)
    labels: str = "ltr"
    task: str = "hubert_pretraining"


VARIANTS: dict[str, Variant] = {
    "hubert_base": Variant("hubert", BASE),
    "hubert_large": Variant("hubert", LARGE, normalize=True),
    "hubert_base_pre_norm": Variant("hubert", BASE | {"layer_norm_first": True}),
    "hubert_large_post_norm": Variant("hubert", LARGE | {"layer_norm_first": False}),
    "hubert_two_dictionaries": Variant("hubert", BASE, clusters=(20, 12)),
    "hubert_final_dim_0": Variant("hubert", BASE | {"final_dim": 0}),
    "hubert_target_glu": Variant("hubert", BASE | {"target_glu": True}),
    "hubert_no_post_extract_proj": Variant("hubert", BASE | {"encoder_embed_dim": 32}),
    "hubert_batch_norm": Variant("hubert", BASE | {"conv_pos_batch_norm": True}),
    "hubert_large_batch_norm": Variant("hubert", LARGE | {"conv_pos_batch_norm": True}, normalize=True),
    "hubert_pos_conv_plain": Variant("hubert", BASE, plain_positions=True),
    "hubert_other_task": Variant("hubert", BASE, task="contentvec_pretraining"),
    "hubert_ctc_base": Variant("hubert_ctc", BASE),
    "hubert_ctc_large": Variant("hubert_ctc", LARGE, normalize=True),
    "hubert_ctc_batch_norm": Variant("hubert_ctc", BASE | {"conv_pos_batch_norm": True}),
    "hubert_ctc_no_label_embeddings": Variant("hubert_ctc", BASE | {"untie_final_proj": False}, clusters=()),
    "hubert_ctc_no_mask": Variant("hubert_ctc", BASE | {"mask_prob": 0.0}, {"mask_prob": 0.0, "apply_mask": False}),
    "wav2vec_ctc_around_hubert": Variant("wav2vec_ctc", LARGE, normalize=True),  # what `Wav2VecCtc` makes of a HuBERT
    "hubert_ctc_phones": Variant("hubert_ctc", BASE, symbols=("|", "AA", "B", "CH", "IY"), labels="phn"),
}
# What transformers cannot represent: the setting that is refused -> the model
REFUSED: dict[str, Variant] = {
    "layer_type": Variant("hubert", BASE | {"layer_type": "conformer", "attn_type": "espnet"}),
}


def settings(variant: Variant) -> dict[str, Any]:
    """The settings as today's trainer writes them: a plain nested dict with every field of fairseq's dataclasses."""
    common = {"sample_rate": 16000, "normalize": variant.normalize, "data": "manifests"}
    task: Any = {"_name": variant.task, "labels": [f"layer6.km{count}" for count in variant.clusters]} | common
    task = OmegaConf.merge(HubertPretrainingConfig(), task | {"label_rate": 50.0, "label_dir": "labels"})
    model = OmegaConf.merge(HubertConfig(), {"_name": "hubert"} | variant.encoder)
    pretrained = {"_name": None, "common": {"seed": 1, "tpu": False}, "model": model, "task": task}
    pretrained["criterion"] = {"_name": "hubert", "pred_masked_weight": 1.0, "loss_weights": [10], "log_keys": []}
    if variant.kind == "hubert":
        return _plain(pretrained)
    own = {"_name": "hubert_ctc", "w2v_path": "base.pt", "apply_mask": True, "mask_prob": 0.5, "layerdrop": 0.02}
    own |= {"mask_channel_prob": 0.1, "mask_channel_length": 8, "final_dropout": 0.01, "dropout": 0.06}
    if variant.encoder["mask_prob"] == 0:
        own["mask_channel_prob"] = 0.0
    outer: Any = OmegaConf.merge(HubertCtcConfig(), own | variant.fine_tuned)
    if variant.kind == "wav2vec_ctc":
        outer = OmegaConf.merge(Wav2Vec2CtcConfig(), own | {"_name": variant.kind, "normalize": variant.normalize})
    with open_dict(outer):
        outer.w2v_args = _plain(pretrained | {"criterion": None})
    labelled: Any = {"_name": "hubert_pretraining", "fine_tuning": True, "single_target": True} | common
    labelled = OmegaConf.merge(HubertPretrainingConfig(), labelled | {"labels": [variant.labels]})
    fine_tuned = {"_name": None, "common": {"seed": 1, "tpu": False}, "model": outer, "task": labelled}
    fine_tuned["criterion"] = {"_name": "ctc", "zero_infinity": True, "post_process": "letter"}
    fine_tuned["distributed_training"] = {"ddp_backend": "no_c10d"}
    return _plain(fine_tuned)


def clusters(variant: Variant) -> list[Dictionary]:
    """The dictionaries of the pretraining: the numbers of k-means clusters."""
    made = []
    for count in variant.clusters:
        made.append(Dictionary())
        for index in range(count - made[-1].nspecial):
            made[-1].add_symbol(str(index))
    return made


def build(variant: Variant | str, seed: int = 0) -> torch.nn.Module:
    """Build fairseq's model in eval mode, every parameter and running statistic random."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    torch.manual_seed(seed)
    configuration = OmegaConf.create(settings(variant))
    pretraining = configuration.task if variant.kind == "hubert" else configuration.model.w2v_args.task
    pretraining._name = "hubert_pretraining"
    state = {"dictionaries": clusters(variant) or [None]}
    if variant.kind == "hubert":
        task = HubertPretrainingTask.setup_task(configuration.task)
        task.load_state_dict(state)
        model = HubertModel.build_model(configuration.model, task)
    else:
        task = HubertPretrainingTask.setup_task(configuration.task)
        task.load_state_dict(state | {"target_dictionary": dictionary(variant.symbols)})
        configuration.model.autoregressive = False  # fairseq main reads it, and HubertCtcConfig has no such field
        model = HubertCtc.build_model(configuration.model, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
                module.num_batches_tracked.fill_(1234)
    if variant.plain_positions:
        torch.nn.utils.remove_weight_norm(model.encoder.pos_conv[0])
    return model.eval()


def task_state(variant: Variant) -> dict[str, Any]:
    """What the task keeps in a checkpoint: the dictionaries that it loaded."""
    if variant.kind == "hubert":
        return {"dictionaries": clusters(variant)}
    return {"target_dictionary": dictionary(variant.symbols)}


def save(
    variant: Variant | str, path: Path, *, seed: int = 0, model: torch.nn.Module | None = None, **options: Any
) -> Path:
    """Write a checkpoint; the options are those of `fairseq_models.write`."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    made = build(variant, seed) if model is None else model
    return write(path, made, settings(variant), task_state(variant), **options)
