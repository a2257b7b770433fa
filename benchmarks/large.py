"""Make a checkpoint with the shape of wav2vec2-large LV-60k fine-tuned on letters: 24 layers, 317M parameters, random.

As released in 2020: `args` a flat Namespace with the pretrained model's `w2v_args` inside, optionally with Adam's state
beside the model, in the zip or in the legacy container. Usage: `python benchmarks/large.py FILE.pt [--adam] [--legacy]`.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import torch

from convert.families.base import Part
from convert.families.ctc import Symbols
from convert.families.encoder import Encoder, Layout
from convert.mapping import table

LETTERS = list("|ETAONIHSRDLUMWCFGYPBVK'XJQZ")
CONVOLUTIONS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
LARGE = Layout(
    family="wav2vec2",
    kind="ctc",
    prefix="w2v_encoder.w2v_model.",
    encoder=Encoder(
        convolutions=((512, 10), *((512, 3),) * 4, (512, 2), (512, 2)),
        group_norm=False,
        conv_bias=True,
        projection=True,
        weight_norm=True,
        hidden=1024,
        ffn=4096,
        layers=24,
        conv_pos=128,
        pos_group=64,
    ),
    head=Symbols(len(LETTERS) + 4),
    own=Part(),
)
ENCODER = {
    "arch": "wav2vec2",
    "task": "audio_pretraining",
    "criterion": "wav2vec",
    "extractor_mode": "layer_norm",
    "encoder_layers": 24,
    "encoder_embed_dim": 1024,
    "encoder_ffn_embed_dim": 4096,
    "encoder_attention_heads": 16,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "dropout_input": 0.0,
    "dropout_features": 0.0,
    "final_dim": 768,
    "layer_norm_first": True,
    "conv_feature_layers": CONVOLUTIONS,
    "conv_bias": True,
    "logit_temp": 0.1,
    "quantize_targets": True,
    "quantize_input": False,
    "same_quantizer": False,
    "target_glu": False,
    "feature_grad_mult": 1.0,
    "latent_vars": 320,
    "latent_groups": 2,
    "latent_dim": 0,
    "mask_length": 10,
    "mask_prob": 0.65,
    "mask_channel_length": 64,
    "mask_channel_prob": 0.0,
    "num_negatives": 100,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "latent_temp": "(2.0, 0.1, 0.999995)",
    "normalize": True,
    "sample_rate": 16000,
}
FINE_TUNED = {
    "arch": "wav2vec_ctc",
    "task": "audio_pretraining",
    "criterion": "ctc",
    "labels": "ltr",
    "normalize": True,
    "sample_rate": 16000,
    "final_dropout": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.1,
    "layerdrop": 0.1,
    "apply_mask": True,
    "mask_prob": 0.65,
    "mask_length": 10,
    "mask_channel_prob": 0.5,
    "mask_channel_length": 64,
    "zero_infinity": True,
    "w2v_path": "libri960_big.pt",
}


def state_dict(layout: Layout = LARGE, seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    """Make random weights of a layout, float32."""
    generator = torch.Generator().manual_seed(seed)
    specs = table(layout).source
    return OrderedDict((key, torch.randn(spec.shape, generator=generator) * 0.02) for key, spec in specs.items())


def save(path: Path, *, adam: bool = False, legacy: bool = False, layout: Layout = LARGE) -> Path:
    """Write a checkpoint in the layout of 2020."""
    model = state_dict(layout)
    encoder = ENCODER | {"encoder_layers": layout.encoder.layers}
    state = {
        "args": Namespace(**FINE_TUNED, w2v_args=Namespace(**encoder)),
        "model": model,
        "optimizer_history": [{"criterion_name": "CtcCriterion", "optimizer_name": "FairseqAdam", "num_updates": 1}],
        "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
    if adam:
        moments = {i: {"step": 1, "exp_avg": t * 0.1, "exp_avg_sq": t * t} for i, t in enumerate(model.values())}
        state["last_optimizer_state"] = {"state": moments, "param_groups": [{"params": list(moments)}]}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


def dictionary(path: Path) -> Path:
    """Write the dictionary of letters."""
    path.write_text("".join(f"{letter} 1\n" for letter in LETTERS), "utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--adam", action="store_true")
    parser.add_argument("--legacy", action="store_true")
    asked = parser.parse_args()
    save(asked.file, adam=asked.adam, legacy=asked.legacy)
    dictionary(asked.file.with_suffix(".dict.txt"))
