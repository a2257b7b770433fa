"""Tiny real fairseq sequence-to-sequence models (wav2vec 2.0 and HuBERT encoders), saved the way fairseq's trainer saves them."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq.models.hubert.hubert import HubertConfig
from fairseq.models.hubert.hubert_asr import HubertSeq2SeqConfig, HubertSeq2SeqModel
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2Seq2SeqConfig, Wav2Vec2Seq2SeqModel
from fairseq.tasks.audio_finetuning import AudioFinetuningConfig, AudioFinetuningTask
from fairseq.tasks.audio_pretraining import AudioPretrainingConfig
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
from fairseq_models import BASE, LARGE, LETTERS, _plain, dictionary
from omegaconf import OmegaConf, open_dict

DECODER: dict[str, Any] = {
    "decoder_embed_dim": 48,
    "decoder_ffn_embed_dim": 80,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_dropout": 0.11,
    "decoder_attention_dropout": 0.12,
    "decoder_activation_dropout": 0.13,
    "decoder_layerdrop": 0.14,
    "max_target_positions": 12,
}
SAME_WIDTH = DECODER | {"decoder_embed_dim": 64}  # the encoder's: no projection between them
LEARNED = {"decoder_learned_pos": True}
PRE_NORM = {"decoder_normalize_before": True}
SHARED = {"share_decoder_input_output_embed": True}
HUBERT: dict[str, Any] = {
    key: value for key, value in BASE.items() if not key.startswith(("latent", "quantize", "num_neg", "mask_prob"))
} | {"label_rate": 50.0, "mask_prob": 0.8}
HUBERT_LARGE = HUBERT | {"extractor_mode": "layer_norm", "layer_norm_first": True, "encoder_layers": 3}


@dataclass(frozen=True)
class Seq2Seq:
    """One model: the encoder's kind and settings, the decoder's settings, and what else differs."""

    kind: str
    encoder: dict[str, Any]
    decoder: dict[str, Any]
    normalize: bool = False
    task: dict[str, Any] = field(default_factory=dict)
    symbols: tuple[str, ...] = tuple(LETTERS)
    old_positions: bool = False  # the buffer that fairseq kept beside sinusoidal positions until 2022


VARIANTS: dict[str, Seq2Seq] = {
    "sinusoidal": Seq2Seq("wav2vec2", BASE, DECODER),
    "learned": Seq2Seq("wav2vec2", BASE, DECODER | LEARNED),
    "shared": Seq2Seq("wav2vec2", BASE, DECODER | SHARED),
    "same_width": Seq2Seq("wav2vec2", BASE, SAME_WIDTH),
    "pre_norm": Seq2Seq("wav2vec2", BASE, DECODER | PRE_NORM),
    "pre_norm_learned_shared": Seq2Seq("wav2vec2", BASE, SAME_WIDTH | PRE_NORM | LEARNED | SHARED),
    "large": Seq2Seq("wav2vec2", LARGE, DECODER | LEARNED | SHARED, normalize=True),
    "width_512": Seq2Seq("wav2vec2", BASE, DECODER | {"decoder_embed_dim": 512, "decoder_layers": 1}),
    "odd_width": Seq2Seq("wav2vec2", BASE, DECODER | {"decoder_embed_dim": 45, "decoder_attention_heads": 3}),
    "old_positions": Seq2Seq("wav2vec2", BASE, DECODER, old_positions=True),
    "sentencepiece": Seq2Seq(
        "wav2vec2",
        BASE,
        DECODER,
        task={"eval_wer_post_process": "sentencepiece"},
        symbols=("▁the", "▁", "s", "at", "▁c", "o", "n"),
    ),
    "hubert": Seq2Seq("hubert", HUBERT, DECODER),
    "hubert_large_pre_norm": Seq2Seq("hubert", HUBERT_LARGE, SAME_WIDTH | PRE_NORM | LEARNED, normalize=True),
}
# What transformers cannot represent: the setting that is refused -> the model
REFUSED: dict[str, Seq2Seq] = {
    "no_token_positional_embeddings": Seq2Seq("wav2vec2", BASE, DECODER | {"no_token_positional_embeddings": True}),
    "pos_conv_depth": Seq2Seq("wav2vec2", BASE | {"pos_conv_depth": 2}, DECODER),
    "eval_wer_post_process": Seq2Seq("wav2vec2", BASE, DECODER, task={"eval_wer_post_process": "byte_pairs"}),
}


def settings(variant: Seq2Seq) -> dict[str, Any]:
    """The settings as today's trainer writes them: a plain nested dict with every field of fairseq's dataclasses."""
    common = {"sample_rate": 16000, "normalize": variant.normalize, "data": "manifests"}
    hubert = variant.kind == "hubert"
    if hubert:
        task = OmegaConf.merge(HubertPretrainingConfig(), {"_name": "hubert_pretraining", "labels": ["km"]} | common)
        model = OmegaConf.merge(HubertConfig(), {"_name": "hubert"} | variant.encoder)
    else:
        task = OmegaConf.merge(AudioPretrainingConfig(), {"_name": "audio_pretraining"} | common)
        model = OmegaConf.merge(Wav2Vec2Config(), {"_name": "wav2vec2"} | variant.encoder)
    pretrained = {"_name": None, "common": {"seed": 1, "tpu": False}, "model": model, "task": task, "criterion": None}
    own = {"_name": f"{'hubert' if hubert else 'wav2vec'}_seq2seq", "w2v_path": "base.pt", "apply_mask": True}
    own |= {"mask_prob": 0.5, "mask_channel_prob": 0.1, "mask_channel_length": 8, "layerdrop": 0.02, "dropout": 0.06}
    own |= {"final_dropout": 0.01}
    own |= {"encoder_embed_dim": variant.decoder["decoder_embed_dim"]} if hubert else {}
    outer = OmegaConf.merge(HubertSeq2SeqConfig() if hubert else Wav2Vec2Seq2SeqConfig(), own | variant.decoder)
    with open_dict(outer):
        outer.w2v_args = _plain(pretrained)
    labelled = {"_name": "audio_finetuning", "labels": "ltr", "autoregressive": True} | common | variant.task
    criterion = {"_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1, "sentence_avg": True}
    made = {"_name": None, "common": {"seed": 1, "tpu": False}, "model": outer, "criterion": criterion}
    made |= {"distributed_training": {"ddp_backend": "no_c10d"}}
    return _plain(made | {"task": OmegaConf.merge(AudioFinetuningConfig(), labelled)})


def build(variant: Seq2Seq | str, seed: int = 0) -> torch.nn.Module:
    """Build fairseq's model in eval mode, every parameter random: norms, biases and weight norm magnitudes too."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    torch.manual_seed(seed)
    configuration = OmegaConf.create(settings(variant))
    task = AudioFinetuningTask(configuration.task)
    task.state.merge_state_dict({"target_dictionary": dictionary(variant.symbols)})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dict.km.txt").write_text("".join(f"{index} 1\n" for index in range(10)))
        configuration.model.data = folder
        if variant.kind == "hubert":
            model = HubertSeq2SeqModel.build_model(configuration.model, task)
        else:
            # TransformerConfig.encoder.embed_dim, the width of the cross-attention's keys, is 512 unless this is set
            configuration.model.encoder_embed_dim = configuration.model.decoder_embed_dim
            model = Wav2Vec2Seq2SeqModel.build_model(configuration.model, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(variant: Seq2Seq | str, path: Path, *, seed: int = 0, model: torch.nn.Module | None = None) -> Path:
    """Write a checkpoint with its settings as a plain dict."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    model = build(variant, seed) if model is None else model
    weights = OrderedDict((key, value.detach().clone()) for key, value in model.state_dict().items())
    if variant.old_positions:
        weights["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    state: dict[str, Any] = {"args": None, "cfg": settings(variant), "model": weights, "criterion": OrderedDict()}
    state["optimizer_history"] = [
        {"criterion_name": "LabelSmoothedCrossEntropyCriterion", "num_updates": 7, "lr_scheduler_state": {}}
    ]
    state["task_state"] = {"target_dictionary": dictionary(variant.symbols)}
    state["extra_state"] = {"metrics": [], "previous_training_time": 1.5}
    state["last_optimizer_state"] = None
    torch.save(state, path)
    return path
