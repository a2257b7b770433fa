"""wav2vec 2.0 with conformer layers (`fairseq.modules.conformer_layer`): what its settings mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.mapping import conformer
from convert.model.encoder import Sources, plain_layout, quantizer_values
from convert.model.fields import (
    CHOICES,
    COUNTS,
    DEFAULTS,
    LIMITS,
    QUANTIZER,
    READ,
    READ_QUANTIZER,
    SAME,
    TRAINING_ONLY,
    Fields,
    Limit,
)
from convert.model.types import Value

POSITIONS = {"rel_pos": "relative", "rope": "rotary"}  # pos_enc_type -> position_embeddings_type
# a layer has one dropout for all its parts, and always swish
_WITHOUT_EFFECT = {"activation_fn", "activation_dropout", "attention_dropout"}
# fmt: off
_LIMITS = (
    Limit("layer_norm_first", lambda value: value is True, "Wav2Vec2ConformerModel normalises after its layers, fairseq then before them", required=True),
    Limit("attn_type",        lambda value: value == "espnet", "fairseq's own attention leaves positions out, Wav2Vec2ConformerModel's does not", required=True),
    Limit("pos_enc_type",     lambda value: value in POSITIONS, "Wav2Vec2ConformerModel has relative and rotary positions, and does not use its positional convolution",
          required=True),
)
# fmt: on
FIELDS = Fields(
    same={name: target for name, target in SAME.items() if name not in {*_WITHOUT_EFFECT, "layer_norm_first"}}
    | QUANTIZER
    | {"depthwise_conv_kernel_size": "conv_depthwise_kernel_size"},
    choices={"extractor_mode": CHOICES["extractor_mode"]},
    limits=tuple(limit for limit in LIMITS if limit.field != "layer_type") + _LIMITS,
    read=READ - {"activation_fn"} | READ_QUANTIZER,
    training_only=TRAINING_ONLY - {"attn_type", "depthwise_conv_kernel_size", "pos_enc_type"} | _WITHOUT_EFFECT,
    defaults=DEFAULTS | {"depthwise_conv_kernel_size": 31},
    counts=COUNTS | {"depthwise_conv_kernel_size"},
)


def layout(sources: Sources, seen: Any, stated: Mapping[str, Any]) -> conformer.Layout | None:
    """State the geometry of a model with conformer layers; `None` for another attention, which is refused. See `plain_layout`."""
    reader = sources.reader
    if reader.values.get("attn_type") != "espnet" or reader.values.get("pos_enc_type") not in POSITIONS:
        return None
    return conformer.Layout.of(
        plain_layout(sources, seen, stated),
        relative=reader.values.get("pos_enc_type") == "rel_pos",
        heads=reader.get("encoder_attention_heads", int),
        depthwise=reader.get("depthwise_conv_kernel_size", int, FIELDS.defaults["depthwise_conv_kernel_size"]),
    )


def values(sources: Sources) -> list[Value]:
    """What conformer layers have, beside the widths of the quantizer."""
    reader = sources.reader
    dropout, origin = reader.get("dropout", float, DEFAULTS["dropout"]), reader.origin("dropout")
    positions = POSITIONS.get(str(reader.values.get("pos_enc_type")))
    return [
        *quantizer_values(sources),
        Value("activation_dropout", dropout, origin),
        Value("attention_dropout", dropout, origin),
        Value("conformer_conv_dropout", dropout, origin),
        Value("hidden_act", "swish", "conformer layers always use swish"),
        Value("position_embeddings_type", positions, reader.origin("pos_enc_type")),
        Value("rotary_embedding_base", 10000, "RotaryPositionMultiHeadedAttention's default"),
        # both libraries lengthen this table when they need to: max_positions, usually 100,000, would only take 0.8 GB
        Value("max_source_positions", 5000, "transformers' default: a table that grows on demand"),
    ]
