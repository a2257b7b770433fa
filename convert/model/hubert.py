"""What HuBERT's settings mean, and the file that keeps its pretraining head.

Sources: `fairseq.models.hubert.hubert.HubertConfig`, `hubert_asr.HubertCtcConfig` and `transformers.HubertConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.mapping import hubert
from convert.model.encoder import Sources, kept_head
from convert.model.fields import CHOICES, DEFAULTS, FLAGS, READ, SAME, TRAINING_ONLY, Fields, Limit, at_most_one, only
from convert.model.types import KEPT_HEAD, Sidecar, Value

# The pretraining head's, or `dropout_features`, which acts before what nothing reads.
_TRAINING_ONLY = {"dropout_features", "label_rate", "logit_temp", "skip_masked", "skip_nomask", "target_glu"}
# fmt: off
FIELDS = Fields(
    same=SAME | {"conv_pos_batch_norm": "conv_pos_batch_norm"},
    choices=CHOICES,
    limits=(
        Limit("layer_type",     only("transformer"), "HubertModel has transformer layers; Wav2Vec2Conformer leaves out the positional convolution, which HuBERT's conformer has"),
        Limit("pos_conv_depth", at_most_one,         "HubertModel has one positional convolution"),
    ),
    read=READ | {"final_dim", "untie_final_proj"},
    training_only=frozenset(TRAINING_ONLY | _TRAINING_ONLY),
    defaults=DEFAULTS | {"conv_pos_batch_norm": False},
    flags=frozenset(FLAGS | {"conv_pos_batch_norm"}),
)
# fmt: on


def layout(sources: Sources, seen: hubert.Layout, stated: Mapping[str, Any]) -> hubert.Layout:
    """State the geometry of HuBERT; how many clusters and dictionaries there were, only its pretraining head tells.

    Args:
        sources: where the settings are.
        seen: what the tensors' shapes say.
        stated: what the settings say of every family's encoder.
    """
    reader = sources.reader
    label = reader.get("final_dim", int, 0)
    label = label if label > 0 else stated["hidden"]
    separate = reader.get("untie_final_proj", bool, False)
    return hubert.Layout(
        **stated,
        codes=0,
        code_width=0,
        codevector=0,
        final=label * max(1, seen.final // label) if separate else label,
        batch_norm=reader.get("conv_pos_batch_norm", bool, False),
        clusters=seen.clusters,
        label=label,
    )


def values(sources: Sources) -> list[Value]:
    """What only HuBERT's configuration has."""
    made = [Value("feat_proj_layer_norm", True, "HubertModel always has layer_norm")]
    rows = sources.checkpoint.inventory.get("final_proj.bias")
    if (
        sources.request.keep_final_proj and rows and rows.shape
    ):  # what people's own classes build their `final_proj` with
        made.append(Value("classifier_proj_size", rows.shape[0], f"the rows of final_proj in {KEPT_HEAD}"))
    return made


def sidecars(sources: Sources) -> list[Sidecar]:
    """Keep the pretraining head in a file of its own, where that is asked for and there is one."""
    return kept_head(sources, "hubert", hubert.head_table)
