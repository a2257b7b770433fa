"""Tiny real fairseq audio classifiers (`wav2vec_classification`) with random weights, saved as fairseq's trainer saves them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fairseq_models
import torch
from fairseq.data import Dictionary
from fairseq.models.wav2vec import wav2vec2_classification as reference
from fairseq.models.wav2vec.wav2vec2_asr import Wav2VecEncoder
from fairseq.tasks.audio_classification import AudioClassificationConfig
from fairseq_models import BASE, LARGE, _plain, _Task, write
from omegaconf import OmegaConf, open_dict

LANGUAGES = ("eng", "deu", "cmn", "swh", "yor")
EMOTIONS = ("anger", "fear", "joy")


@dataclass(frozen=True)
class Variant:
    """One classifier: the pretrained model's settings, the fine-tuned model's, the labels, and the task's `normalize`."""

    encoder: dict[str, Any]
    fine_tuned: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = LANGUAGES
    normalize: bool = False


LINEAR = {"pooling": "mean", "activation_fn": "linear"}
VARIANTS: dict[str, Variant] = {
    "classification_base": Variant(BASE, LINEAR),
    "classification_large": Variant(LARGE, LINEAR, normalize=True),
    "classification_latent": Variant(LARGE, LINEAR | {"latent_embed_dim": 24}, EMOTIONS, normalize=True),  # as MMS-LID
    "classification_one_label": Variant(BASE, LINEAR | {"apply_mask": False}, ("speech",)),
    "classification_words": Variant(BASE, LINEAR, ("<s>", "two words", "ä", "0", "<unk>", "LABEL_0")),
    "classification_gelu_fast": Variant(BASE | {"activation_fn": "gelu_fast"}, LINEAR),  # the encoder's own activation
}
# What transformers cannot represent: the setting that is refused -> the models
REFUSED: dict[str, tuple[Variant, ...]] = {
    "activation_fn": tuple(Variant(BASE, {"pooling": "mean", "activation_fn": name}) for name in ("gelu", "relu")),
    "pooling": tuple(
        Variant(BASE, LINEAR | {"pooling": name}) for name in ("first_token", "max", "mean_amsoftmax", "elmo")
    ),
}
POOLINGS = {
    "mean": reference.MeanPoolingFast,
    "first_token": reference.FirstToken,
    "max": reference.MaxPoolingFast,
    "mean_amsoftmax": reference.MeanPoolingFastAMSoftmax,
    "elmo": reference.LayerWeightedMeanPooling,
}


def dictionary(labels: tuple[str, ...] = LANGUAGES) -> Dictionary:
    """A real fairseq dictionary of labels, which has no special symbols."""
    made = Dictionary(add_special_symbols=False)
    for index, label in enumerate(labels):
        made.add_symbol(label, n=100 + index)
    return made


def settings(variant: Variant) -> dict[str, Any]:
    """The settings as today's trainer writes them: a plain nested dict with every field of fairseq's dataclasses."""
    ctc = fairseq_models.settings(fairseq_models.Variant("ctc", variant.encoder, normalize=variant.normalize))
    model = OmegaConf.structured(reference.Wav2Vec2ClassificationConfig())
    same = {key: value for key, value in ctc["model"].items() if key in model and key != "w2v_args"}
    model = OmegaConf.merge(
        model, same | {"_name": "wav2vec_classification", "w2v_path": "base.pt"} | variant.fine_tuned
    )
    with open_dict(model):
        model.w2v_args = ctc["model"]["w2v_args"]
    own = {"_name": "audio_classification", "labels": "lang", "data": "manifests", "normalize": variant.normalize}
    made = ctc | {"model": model, "task": OmegaConf.merge(AudioClassificationConfig(), own)}
    return _plain(made | {"criterion": {"_name": "cross_entropy", "sentence_avg": True}})


def build(variant: Variant | str, seed: int = 0) -> torch.nn.Module:
    """Build fairseq's model in eval mode with random weights.

    Of the poolings, `Wav2VecClassification.build_model` makes `mean` only; the others' classes are put in by hand.
    """
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    torch.manual_seed(seed)
    configuration = OmegaConf.create(settings(variant)).model
    labels = dictionary(variant.labels)
    if configuration.pooling == "mean":
        model = reference.Wav2VecClassification.build_model(configuration, _Task(labels))
    else:
        pooling, width = POOLINGS[configuration.pooling], variant.encoder["encoder_embed_dim"]
        layers = (variant.encoder["encoder_layers"],) if configuration.pooling == "elmo" else ()
        encoder = Wav2VecEncoder(configuration, None)
        model = reference.Wav2VecClassification(
            configuration, encoder, pooling(configuration, width, len(labels), *layers)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(
    variant: Variant | str, path: Path, *, seed: int = 0, model: torch.nn.Module | None = None, **how: Any
) -> Path:
    """Write a checkpoint, with its labels in `task_state`; `how` as for `fairseq_models.write`."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    model = build(variant, seed) if model is None else model
    return write(path, model, settings(variant), {"target_dictionary": dictionary(variant.labels)}, **how)
