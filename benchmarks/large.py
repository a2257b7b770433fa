"""Make a checkpoint with the shape of wav2vec2-large LV-60k fine-tuned on letters: 24 layers, 317M parameters, as initialised.

As released in 2020: `args` a flat Namespace with the pretrained model's `w2v_args` inside, optionally with Adam's state
beside the model, in the zip or in the legacy container. With `--languages N`, as MMS: adapters and a head for each language,
whose numbers are views of one random array, so that the file may be larger than the memory.
Usage: `python benchmarks/large.py FILE.pt [--adam] [--legacy] [--small] [--languages N] [--layers N] [--width N] [--ffn N]`.
"""

from __future__ import annotations

import argparse
import itertools
import string
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

LETTERS = list("|ETAONIHSRDLUMWCFGYPBVK'XJQZ")
LARGE, SMALL = (24, 1024), (2, 64)  # layers, width
KERNELS = (10, 3, 3, 3, 3, 2, 2)
POSITIONS, GROUPS = 128, 16
ENCODER = {
    "arch": "wav2vec2",
    "task": "audio_pretraining",
    "criterion": "wav2vec",
    "extractor_mode": "layer_norm",
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
    "conv_pos": POSITIONS,
    "conv_pos_groups": GROUPS,
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
ADAPTER = 16  # `adp_dim` of MMS


def shapes(layers: int, width: int, ffn: int) -> OrderedDict[str, tuple[int, ...]]:
    """List fairseq's tensors of a CTC model with layer norm, in the order of its modules."""
    encoder, channels = "w2v_encoder.w2v_model.", width // 2
    found: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def add(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    found[f"{encoder}mask_emb"] = (width,)
    for index, kernel in enumerate(KERNELS):
        add(f"{encoder}feature_extractor.conv_layers.{index}.0", channels, channels if index else 1, kernel)
        add(f"{encoder}feature_extractor.conv_layers.{index}.2.1", channels)
    add(f"{encoder}post_extract_proj", width, channels)
    found[f"{encoder}encoder.pos_conv.0.bias"] = (width,)
    found[f"{encoder}encoder.pos_conv.0.weight_g"] = (1, 1, POSITIONS)
    found[f"{encoder}encoder.pos_conv.0.weight_v"] = (width, width // GROUPS, POSITIONS)
    for index in range(layers):
        layer = f"{encoder}encoder.layers.{index}."
        for part in ("k", "v", "q", "out"):
            add(f"{layer}self_attn.{part}_proj", width, width)
        add(f"{layer}self_attn_layer_norm", width)
        add(f"{layer}fc1", ffn, width)
        add(f"{layer}fc2", width, ffn)
        add(f"{layer}final_layer_norm", width)
    add(f"{encoder}encoder.layer_norm", width)
    add(f"{encoder}layer_norm", channels)
    add("w2v_encoder.proj", len(LETTERS) + 4, width)
    return found


def state_dict(size: tuple[int, int] = LARGE, seed: int = 0, ffn: int = 0) -> OrderedDict[str, torch.Tensor]:
    """Make weights about as fairseq initialises them, float32: norms of ones and zeros, no biases."""
    generator = torch.Generator().manual_seed(seed)
    made: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, shape in shapes(*size, ffn or 4 * size[1]).items():
        spread = 0.5 / (shape[1] * shape[2]) ** 0.5 if len(shape) == 3 else 0.02
        if name.endswith("bias"):
            made[name] = torch.zeros(shape)
        elif len(shape) == 1 and name.endswith("weight"):
            made[name] = torch.ones(shape)
        elif name.endswith("weight_g"):
            made[name] = torch.full(shape, 2.0)
        else:
            made[name] = torch.randn(shape, generator=generator) * spread
    return made


def language_shapes(layers: int, width: int, symbols: int) -> dict[str, tuple[int, ...]]:
    """List what MMS keeps for each language: the adapters, stacked for one, and the head."""
    adapter = {"W_a": (ADAPTER, width), "b_a": (ADAPTER,), "W_b": (width, ADAPTER)}
    adapter |= {"b_b": (width,), "ln_W": (width,), "ln_b": (width,)}
    found: dict[str, tuple[int, ...]] = {}
    for index in range(layers):
        layer = f"w2v_encoder.w2v_model.encoder.layers.{index}.adapter_layer."
        found |= {layer + name: (1, *shape) for name, shape in adapter.items()}
    return found | {"w2v_encoder.proj.weight": (symbols, width), "w2v_encoder.proj.bias": (symbols,)}


def languages(count: int, size: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    """Make the `adapter` of an MMS checkpoint: language -> its tensors, each a storage of its own, and its dictionary."""
    from fairseq.data import Dictionary

    random = np.random.default_rng(seed)
    numbers = random.standard_normal(1 << 22, np.float32) * np.float32(0.02)
    names = [
        "eng",
        *("".join(name) for name in itertools.product("bcd", string.ascii_lowercase, string.ascii_lowercase)),
    ]
    made = {}
    for name in names[:count]:
        dictionary = Dictionary()
        for symbol in ["|", *random.permutation(LETTERS[1:])[: random.integers(20, len(LETTERS))]]:
            dictionary.add_symbol(str(symbol))
        tensors = OrderedDict()
        for key, shape in language_shapes(*size, len(dictionary)).items():
            length = int(np.prod(shape))
            start = int(random.integers(len(numbers) - length))
            tensors[key] = torch.from_numpy(numbers[start : start + length]).view(shape)
        made[name] = {"model": tensors, "task_state": {"target_dictionary": dictionary}}
    return made


def save(
    path: Path,
    *,
    adam: bool = False,
    legacy: bool = False,
    size: tuple[int, int] = LARGE,
    ffn: int = 0,
    several: int = 0,
) -> Path:
    """Write a checkpoint in the layout of 2020; of several languages, in that of MMS."""
    layers, width = size
    model = state_dict(size, ffn=ffn)
    strides = [(5 if index == 0 else 2) for index in range(len(KERNELS))]
    convolutions = [(width // 2, kernel, stride) for kernel, stride in zip(KERNELS, strides, strict=True)]
    encoder = ENCODER | {
        "encoder_layers": layers,
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": ffn or 4 * width,
    }
    encoder |= {"conv_feature_layers": str(convolutions)}
    fine_tuned: dict[str, Any] = dict(FINE_TUNED)
    adapters: dict[str, Any] = {}
    if several:
        adapters = {"adapter": languages(several, size)}
        first = next(iter(adapters["adapter"].values()))
        model.update(first["model"])
        adapters["task_state"] = first["task_state"]
        fine_tuned |= {"layer_type": "trf_adp", "adp_num": 1, "adp_dim": ADAPTER, "multi_corpus_keys": "eng"}
    state = {
        "args": Namespace(**fine_tuned, w2v_args=Namespace(**encoder)),
        "model": model,
        "optimizer_history": [{"criterion_name": "CtcCriterion", "optimizer_name": "FairseqAdam", "num_updates": 1}],
        "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        **adapters,
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
    parser.add_argument("--small", action="store_true", help="two layers of 64 channels")
    parser.add_argument("--languages", type=int, default=0, help="as MMS, with adapters for so many languages")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument(
        "--ffn", type=int, default=0, help="the width inside the layers; by default four times the other"
    )
    asked = parser.parse_args()
    layers, width = SMALL if asked.small else LARGE
    size = asked.layers or layers, asked.width or width
    save(asked.file, adam=asked.adam, legacy=asked.legacy, size=size, ffn=asked.ffn, several=asked.languages)
    dictionary(asked.file.with_suffix(".dict.txt"))
