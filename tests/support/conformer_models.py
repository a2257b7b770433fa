"""Tiny real fairseq wav2vec 2.0 models with conformer layers, every parameter and running statistic random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fairseq_models
import pytest
import torch
from fairseq.models.wav2vec.wav2vec2 import ConformerEncoder
from fairseq_models import BASE, LARGE, Variant

CONFORMER: dict[str, Any] = {
    "layer_type": "conformer",
    "attn_type": "espnet",
    "layer_norm_first": True,
    "depthwise_conv_kernel_size": 7,
    "max_positions": 500,  # of tiny models; fairseq's default makes a table of 200,000 rows
}
RELATIVE = BASE | CONFORMER | {"pos_enc_type": "rel_pos"}
ROTARY = LARGE | CONFORMER | {"pos_enc_type": "rope"}
TUNED = {"layer_type": "conformer"}  # the fine-tuned model's own default would make transformer layers of it

VARIANTS: dict[str, Variant] = {
    "ctc_relative": Variant("ctc", RELATIVE, TUNED),
    "ctc_rotary": Variant("ctc", ROTARY, TUNED, normalize=True),
    "ctc_relative_large": Variant("ctc", ROTARY | {"pos_enc_type": "rel_pos"}, TUNED, normalize=True),
    "ctc_rotary_base": Variant("ctc", RELATIVE | {"pos_enc_type": "rope"}, TUNED),
    "ctc_relative_short_table": Variant("ctc", RELATIVE | {"max_positions": 20}, TUNED),
    "ctc_relative_head_8": Variant("ctc", RELATIVE | {"encoder_attention_heads": 8}, TUNED),
    "ctc_rotary_head_32": Variant("ctc", ROTARY | {"encoder_attention_heads": 2}, TUNED),
    "ctc_relative_other_activation": Variant("ctc", RELATIVE | {"activation_fn": "relu"}, TUNED),  # without effect
    "ctc_relative_no_post_extract_proj": Variant("ctc", RELATIVE | {"encoder_embed_dim": 32, "encoder_attention_heads": 2}, TUNED),
    "ctc_rotary_pos_conv_plain": Variant("ctc", ROTARY, TUNED, plain_positions=True),
    "ctc_relative_blank_set": Variant("ctc", RELATIVE, TUNED | {"blank_weight": -2.5, "blank_mode": "set"}),
    "pretrained_relative": Variant("pretraining", RELATIVE),
    "pretrained_rotary": Variant("pretraining", ROTARY | {"latent_dim": 0}, normalize=True),
}  # fmt: skip
# What transformers cannot represent: the setting that is refused -> the model
REFUSED: dict[str, Variant] = {
    "pos_enc_type": Variant("ctc", RELATIVE | {"pos_enc_type": "abs"}, TUNED),
    "attn_type": Variant("ctc", ROTARY | {"attn_type": ""}, TUNED),
    "layer_norm_first": Variant("ctc", RELATIVE | {"layer_norm_first": False}, TUNED),
    "pos_conv_depth": Variant("ctc", RELATIVE | {"pos_conv_depth": 2}, TUNED),
    "crop_seq_to_multiple": Variant("pretraining", ROTARY | {"crop_seq_to_multiple": 2}),
}


@contextmanager
def buildable() -> Iterator[None]:
    """Let fairseq build and run a `ConformerEncoder`.

    `TransformerEncoder` hands `layer_idx` and `corpus_key` to its own methods since its adapter layers; the ones that
    `ConformerEncoder` puts in their place take neither. Both are for adapters only.
    """
    layer, features = ConformerEncoder.build_encoder_layer, ConformerEncoder.extract_features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConformerEncoder, "build_encoder_layer", lambda self, args, layer_idx=None: layer(self, args))
        patch.setattr(
            ConformerEncoder,
            "extract_features",
            lambda self, x, padding_mask=None, tgt_layer=None, corpus_key=None: features(
                self, x, padding_mask, tgt_layer
            ),
        )
        yield


def build(variant: Variant | str, seed: int = 0) -> torch.nn.Module:
    """Build fairseq's model in eval mode, every parameter and every running statistic random; run it in `buildable`."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    with buildable():
        model = fairseq_models.build(variant, seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("num_batches_tracked"):
                buffer.random_(1 << 40)
    return model


def save(variant: Variant | str, path: Path, **options: Any) -> Path:
    """Write a checkpoint; the options are those of `fairseq_models.save`."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    model = options.pop("model", None) or build(variant, options.pop("seed", 0))
    return fairseq_models.save(variant, path, model=model, **options)
