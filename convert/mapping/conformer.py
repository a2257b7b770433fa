"""The conversion tables of wav2vec 2.0 with conformer layers (`fairseq.models.wav2vec.wav2vec2.ConformerEncoder`), one line a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from convert.mapping import wav2vec2
from convert.mapping.family import Family, Shapes
from convert.mapping.rules import Drop, Edit, Rename, Rule, Table

# fmt: off
LAYERS = (
    Rename("encoder.layers.{layer}.ffn{half}.layer_norm.{p}",                   "encoder.layers.{layer}.ffn{half}_layer_norm.{p}",                      "hidden"),
    Rename("encoder.layers.{layer}.ffn{half}.w_1.weight",                       "encoder.layers.{layer}.ffn{half}.intermediate_dense.weight",           "ffn hidden"),
    Rename("encoder.layers.{layer}.ffn{half}.w_1.bias",                         "encoder.layers.{layer}.ffn{half}.intermediate_dense.bias",             "ffn"),
    Rename("encoder.layers.{layer}.ffn{half}.w_2.weight",                       "encoder.layers.{layer}.ffn{half}.output_dense.weight",                 "hidden ffn"),
    Rename("encoder.layers.{layer}.ffn{half}.w_2.bias",                         "encoder.layers.{layer}.ffn{half}.output_dense.bias",                   "hidden"),
    Rename("encoder.layers.{layer}.self_attn_layer_norm.{p}",                   "encoder.layers.{layer}.self_attn_layer_norm.{p}",                      "hidden"),
    Rename("encoder.layers.{layer}.self_attn.linear_{qkvo}.weight",             "encoder.layers.{layer}.self_attn.linear_{qkvo}.weight",                "hidden hidden"),
    Rename("encoder.layers.{layer}.self_attn.linear_{qkvo}.bias",               "encoder.layers.{layer}.self_attn.linear_{qkvo}.bias",                  "hidden"),
    Rename("encoder.layers.{layer}.conv_module.layer_norm.{p}",                 "encoder.layers.{layer}.conv_module.layer_norm.{p}",                    "hidden"),
    Rename("encoder.layers.{layer}.conv_module.pointwise_conv1.weight",         "encoder.layers.{layer}.conv_module.pointwise_conv1.weight",            "2hidden hidden 1"),
    Rename("encoder.layers.{layer}.conv_module.depthwise_conv.weight",          "encoder.layers.{layer}.conv_module.depthwise_conv.weight",             "hidden 1 depthwise"),
    Rename("encoder.layers.{layer}.conv_module.batch_norm.{p}",                 "encoder.layers.{layer}.conv_module.batch_norm.{p}",                    "hidden"),
    Rename("encoder.layers.{layer}.conv_module.batch_norm.running_{statistic}", "encoder.layers.{layer}.conv_module.batch_norm.running_{statistic}",    "hidden"),
    Rename("encoder.layers.{layer}.conv_module.batch_norm.num_batches_tracked", "encoder.layers.{layer}.conv_module.batch_norm.num_batches_tracked",    "", dtype="I64"),
    Rename("encoder.layers.{layer}.conv_module.pointwise_conv2.weight",         "encoder.layers.{layer}.conv_module.pointwise_conv2.weight",            "hidden hidden 1"),
    Rename("encoder.layers.{layer}.final_layer_norm.{p}",                       "encoder.layers.{layer}.final_layer_norm.{p}",                          "hidden"),
    Rename("encoder.layer_norm.{p}",                                            "encoder.layer_norm.{p}",                                               "hidden"),
)
RELATIVE = (  # pos_enc_type="rel_pos"
    Rename("encoder.layers.{layer}.self_attn.linear_pos.weight",                "encoder.layers.{layer}.self_attn.linear_pos.weight",                   "hidden hidden"),
    Rename("encoder.layers.{layer}.self_attn.pos_bias_{uv}",                    "encoder.layers.{layer}.self_attn.pos_bias_{uv}",                       "heads head"),
)
ROTARY = (  # pos_enc_type="rope": a buffer in every layer; Hugging Face has it once, for all
    Rename("encoder.layers.0.self_attn.rotary_emb.inv_freq",                    "encoder.embed_positions.inv_freq",                                     "frequencies"),
    Drop("encoder.layers.{later}.self_attn.rotary_emb.inv_freq", "all layers have the same frequencies, and Hugging Face keeps them once", "frequencies",
         repeats="encoder.layers.0.self_attn.rotary_emb.inv_freq"),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Layout(wav2vec2.Layout):
    """The geometry of a model with conformer layers.

    Args:
        relative: whether positions are relative (`rel_pos`); otherwise they are rotary (`rope`).
        heads: `encoder_attention_heads`.
        depthwise: `depthwise_conv_kernel_size`.
    """

    relative: bool
    heads: int
    depthwise: int

    @classmethod
    def of(cls, plain: wav2vec2.Layout, *, relative: bool, heads: int, depthwise: int) -> Layout:
        """Add to the geometry that it shares with wav2vec 2.0 what conformer layers have."""
        shared = {field.name: getattr(plain, field.name) for field in fields(plain)}
        return cls(**shared, relative=relative, heads=heads, depthwise=depthwise)


def table(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one model with conformer layers; see `convert.mapping.table`."""
    layers: tuple[Rule, ...] = LAYERS + (RELATIVE if layout.relative else ROTARY)
    rules = wav2vec2.encoder_rules(layout, layers=layers)
    axes = wav2vec2.axes(layout) | {"half": (1, 2), "statistic": ("mean", "var"), "uv": ("u", "v")}
    axes |= {"later": tuple(range(1, layout.layers))}
    width = layout.hidden // (layout.heads or 1)
    dims = wav2vec2.dims(layout) | {"2hidden": 2 * layout.hidden, "depthwise": layout.depthwise, "heads": layout.heads}
    dims |= {"head": width, "frequencies": (width + 1) // 2}
    heads, drops = wav2vec2.HEADS, wav2vec2.DROPS
    return wav2vec2.assemble(layout, head, edits, encoder=rules, heads=heads, drops=drops, axes=axes, dims=dims)


def infer_layout(shapes: Shapes) -> Layout:
    """Read the geometry off the names and shapes; see `convert.mapping.infer_layout`."""
    seen = wav2vec2.infer_layout(shapes, family=NAME, inner="ffn1.w_1")
    prefix = f"{wav2vec2.PREFIXES[seen.kind]}encoder.layers.0."
    bias = shapes.get(f"{prefix}self_attn.pos_bias_u")
    frequencies = shapes.get(f"{prefix}self_attn.rotary_emb.inv_freq", ())[:1]
    rotary = seen.hidden // (2 * frequencies[0]) if frequencies > (0,) else 0
    return Layout.of(
        seen,
        relative=bias is not None,
        heads=bias[0] if bias else rotary,
        depthwise=([0, *shapes.get(f"{prefix}conv_module.depthwise_conv.weight", ())])[-1],
    )


NAME = "wav2vec2_conformer"
FAMILY = Family(NAME, r"encoder\.layers\.\d+\.conv_module\.", infer_layout, table)
