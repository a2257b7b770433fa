"""What WavLM's settings mean. Sources: `WavLMConfig` in `WavLM.py` of Microsoft's unilm, and `transformers.WavLMConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.mapping import wavlm
from convert.model.encoder import Sources
from convert.model.fields import CHOICES, COUNTS, DEFAULTS, READ, SAME, TRAINING_ONLY, Fields, Limit

_ALWAYS = "every layer of WavLMModel has gated relative positions"
# fmt: off
FIELDS = Fields(
    same=SAME | {"num_buckets": "num_buckets", "max_distance": "max_bucket_distance"},
    choices=CHOICES,
    limits=(
        Limit("relative_position_embedding", lambda value: value is True, _ALWAYS, required=True),
        Limit("gru_rel_pos",                 lambda value: value is True, _ALWAYS, required=True),
        Limit("expand_attention_head_size",  lambda value: value in (None, -1, 0), "the heads of WavLMModel share the width"),
    ),
    read=READ | {"normalize"},
    training_only=frozenset(TRAINING_ONLY | {"dropout_features"}),
    defaults=DEFAULTS,
    counts=frozenset(COUNTS | {"num_buckets", "max_distance"}),
)
# fmt: on


def layout(sources: Sources, seen: wavlm.Layout, stated: Mapping[str, Any]) -> wavlm.Layout:
    """State the geometry of WavLM; see `convert.model.encoder.plain_layout`."""
    reader = sources.reader
    return wavlm.Layout(
        **stated,
        codes=0,
        code_width=0,
        codevector=0,
        final=0,
        heads=reader.get("encoder_attention_heads", int),
        buckets=reader.get("num_buckets", int),
    )
