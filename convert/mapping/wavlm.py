"""What WavLM (`WavLM.py` of Microsoft's unilm) has beside the tensors of wav2vec 2.0's encoder, one line a tensor."""

from __future__ import annotations

from convert.mapping.rules import Rename

# fmt: off
GATED_POSITIONS = (
    Rename("encoder.layers.{layer}.self_attn.grep_a",              "encoder.layers.{layer}.attention.gru_rel_pos_const",           "1 heads 1 1"),
    Rename("encoder.layers.{layer}.self_attn.grep_linear.weight",  "encoder.layers.{layer}.attention.gru_rel_pos_linear.weight",   "8 head"),
    Rename("encoder.layers.{layer}.self_attn.grep_linear.bias",    "encoder.layers.{layer}.attention.gru_rel_pos_linear.bias",     "8"),
    Rename("encoder.layers.0.self_attn.relative_attention_bias.weight", "encoder.layers.0.attention.rel_attn_embed.weight",        "buckets heads"),  # layer 0's serve all
)
# fmt: on
