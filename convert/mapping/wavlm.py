"""The conversion table of WavLM (`WavLM.py` of Microsoft's unilm), one line a tensor: wav2vec 2.0's encoder and gated positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from convert.mapping import wav2vec2
from convert.mapping.family import Family, Shapes
from convert.mapping.rules import Edit, Rename, Table

# fmt: off
GATED_POSITIONS = (
    Rename("encoder.layers.{layer}.self_attn.grep_a",              "encoder.layers.{layer}.attention.gru_rel_pos_const",           "1 heads 1 1"),
    Rename("encoder.layers.{layer}.self_attn.grep_linear.weight",  "encoder.layers.{layer}.attention.gru_rel_pos_linear.weight",   "8 head"),
    Rename("encoder.layers.{layer}.self_attn.grep_linear.bias",    "encoder.layers.{layer}.attention.gru_rel_pos_linear.bias",     "8"),
    Rename("encoder.layers.0.self_attn.relative_attention_bias.weight", "encoder.layers.0.attention.rel_attn_embed.weight",        "buckets heads"),  # layer 0's serves all
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Layout(wav2vec2.Layout):
    """The geometry of a WavLM model: that of wav2vec 2.0 without its quantizer.

    Args:
        heads: `encoder_attention_heads`.
        buckets: `num_buckets`, of distances between frames.
    """

    heads: int
    buckets: int


def table(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one WavLM model; see `convert.mapping.table`."""
    rules = wav2vec2.encoder_rules(layout, layers=(*wav2vec2.LAYERS, *GATED_POSITIONS))
    dims = wav2vec2.dims(layout) | {"heads": layout.heads, "buckets": layout.buckets}
    dims |= {"head": layout.hidden // (layout.heads or 1)}
    nothing = {"pretraining": ()}  # unilm released encoders only
    return wav2vec2.assemble(
        layout, head, edits, encoder=rules, heads={}, drops=nothing, axes=wav2vec2.axes(layout), dims=dims
    )


def infer_layout(shapes: Shapes) -> Layout:
    """Read the geometry of a WavLM model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-source`, when it is no such model.
    """
    seen = asdict(wav2vec2.infer_layout(shapes, family="wavlm"))
    buckets, heads = [*shapes.get("encoder.layers.0.self_attn.relative_attention_bias.weight", ()), 0, 0][:2]
    return Layout(**seen | {"heads": heads, "buckets": buckets})


FAMILY = Family("wavlm", r"\.self_attn\.grep_(a|linear\.)", infer_layout, table)
