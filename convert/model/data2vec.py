"""What data2vec audio's settings mean, and the file that keeps its pretraining head.

Sources: `examples/data2vec/models/data2vec_audio.py` in fairseq and `transformers.Data2VecAudioConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.mapping import data2vec
from convert.model.encoder import Sources, kept_head
from convert.model.fields import CHOICES, READ, SAME, TRAINING_ONLY, Fields, Limit, only
from convert.model.types import Sidecar, Value

# What acts while training only, or is never read by `Data2VecAudioModel`
_TRAINING_ONLY = {
    *("average_top_k_layers", "batch_norm_target_layer", "ema_anneal_end_step", "ema_decay", "ema_end_decay"),
    *("ema_layers_only", "ema_transformer_only", "group_norm_target_layer", "instance_norm_target_layer"),
    *("instance_norm_targets", "layer_norm_target_layer", "layer_norm_targets", "loss_beta", "loss_scale"),
    *("max_update", "min_pred_var", "min_target_var"),
    *("crop_seq_to_multiple", "dropout_features", "final_dim", "latent_dim", "latent_groups", "latent_vars"),
    *("logit_temp", "num_negatives", "quantize_input", "quantize_targets", "quantizer_depth", "target_glu"),
    *("diversity_weight",),  # of the released files, as is the next
    *("conv_feature_no_norm_on_1d",),  # a norm that it left out would be a missing tensor
}
# fmt: off
FIELDS = Fields(
    same={name: field for name, field in SAME.items() if name not in ("conv_pos", "layer_norm_first")},
    choices={"activation_fn": CHOICES["activation_fn"]},
    limits=(
        Limit("extractor_mode",   lambda value: value == "layer_norm", "Data2VecAudioModel has a layer norm on every feature convolution", required=True),
        Limit("layer_norm_first", lambda value: value is False,        "Data2VecAudioModel has its layer norms after each block",          required=True),
        Limit("pos_conv_depth",   lambda value: isinstance(value, int) and value > 1,
              "Data2VecAudioModel has norms after its positional convolutions, and fairseq has them from two on",              required=True),
        Limit("layer_type",       only("transformer"),                 "Data2VecAudioModel has transformer layers"),
    ),
    read=READ | {"conv_pos"},
    training_only=frozenset(TRAINING_ONLY | _TRAINING_ONLY),
    min_masks=1,
)
# fmt: on


def layout(sources: Sources, seen: data2vec.Layout, stated: Mapping[str, Any]) -> data2vec.Layout | None:
    """State the geometry of data2vec audio, which has a projection at any width.

    Args:
        sources: where the settings are.
        seen: what the tensors' shapes say.
        stated: what the settings say of every family's encoder.
    """
    depth, kernel = _positions(sources)
    if depth > len(sources.checkpoint.tensors):  # or the table would be as long as it says
        detail = f"{depth} convolutions of a checkpoint with {len(sources.checkpoint.tensors)} tensors"
        sources.refuse("bad-setting", "pos_conv_depth", detail)
        return None
    own = {"projection": True, "weight_norm": False, "conv_pos": kernel, "depth": depth}
    return data2vec.Layout(**{**stated, **own, "codes": 0, "code_width": 0, "codevector": 0, "final": seen.final})


def values(sources: Sources) -> list[Value]:
    """What only data2vec audio's configuration has: its positional convolutions."""
    depth, kernel = _positions(sources)
    origin = sources.reader.origin
    return [
        Value("num_conv_pos_embeddings", depth, origin("pos_conv_depth")),
        Value("conv_pos_kernel_size", kernel, f"{origin('conv_pos')} // pos_conv_depth, and 3 at least"),
    ]


def _positions(sources: Sources) -> tuple[int, int]:
    """`TransformerEncoder.__init__`: the number of positional convolutions, and the kernel of each."""
    depth = sources.reader.get("pos_conv_depth", int, 1)
    return depth, max(3, sources.reader.count("conv_pos") // max(1, depth))


def sidecars(sources: Sources) -> list[Sidecar]:
    """Keep the pretraining head in a file of its own, where that is asked for and there is one."""
    return kept_head(sources, "data2vec_audio", data2vec.head_table)
