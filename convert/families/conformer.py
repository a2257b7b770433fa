"""wav2vec 2.0 with conformer layers (`fairseq.models.wav2vec.wav2vec2.ConformerEncoder`, `fairseq.modules.conformer_layer`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert.families.base import Family, Part, Running, Shapes, Sources
from convert.families.damages import Change, Configure, Converted, Damages, Exchange, encoder_damages, ones
from convert.families.encoder import Layout, assemble, encoder_rules, infer_encoder
from convert.families.encoder_settings import CHOICES, DEFAULTS, SAME
from convert.families.planning import describe_encoder
from convert.families.settings import Limit, Reader, Settings, Value, must_be
from convert.families.wav2vec2 import FAMILY as WAV2VEC2
from convert.families.wav2vec2 import KINDS, LIMITS, QUANTIZER, from_config, quantizer_values
from convert.families.wav2vec2 import SETTINGS as PLAIN
from convert.rules import Drop, Edit, Rename, Rule, Table

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
class Own(Part):
    """What only conformer layers have.

    Args:
        relative: whether positions are relative (`rel_pos`); otherwise they are rotary (`rope`).
        heads: `encoder_attention_heads`.
        depthwise: `depthwise_conv_kernel_size`.
        layers, hidden: as in the encoder.
    """

    relative: bool
    heads: int
    depthwise: int
    layers: int
    hidden: int

    @property
    def axes(self) -> Mapping[str, tuple[object, ...]]:
        """The values of the axes that the layers' rules name."""
        later = tuple(range(1, self.layers))
        return {"half": (1, 2), "statistic": ("mean", "var"), "uv": ("u", "v"), "later": later}

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes that the layers' rules name."""
        head = self.hidden // (self.heads or 1)
        sizes = {"2hidden": 2 * self.hidden, "depthwise": self.depthwise, "heads": self.heads}
        return {**sizes, "head": head, "frequencies": (head + 1) // 2}


POSITIONS = {"rel_pos": "relative", "rope": "rotary"}  # pos_enc_type -> position_embeddings_type
# a layer has one dropout for all its parts, and always swish
_WITHOUT_EFFECT = {"activation_fn", "activation_dropout", "attention_dropout"}
# fmt: off
_LIMITS = (
    must_be("layer_norm_first", True,     "Wav2Vec2ConformerModel normalises after its layers, fairseq then before them"),
    must_be("attn_type",        "espnet", "fairseq's own attention leaves positions out, Wav2Vec2ConformerModel's does not"),
    Limit("pos_enc_type",       lambda value: value in POSITIONS, "Wav2Vec2ConformerModel has relative and rotary positions, and does not use its positional convolution",
          required=True),
)
# fmt: on
SETTINGS = Settings(
    same={name: target for name, target in SAME.items() if name not in {*_WITHOUT_EFFECT, "layer_norm_first"}}
    | QUANTIZER
    | {"depthwise_conv_kernel_size": "conv_depthwise_kernel_size"},
    choices={"extractor_mode": CHOICES["extractor_mode"]},
    limits=tuple(limit for limit in LIMITS if limit.field != "layer_type") + _LIMITS,
    read=PLAIN.read - {"activation_fn"},
    training_only=PLAIN.training_only - {"attn_type", "depthwise_conv_kernel_size", "pos_enc_type"} | _WITHOUT_EFFECT,
    defaults={**PLAIN.defaults, "depthwise_conv_kernel_size": 31},
    counts=PLAIN.counts | {"depthwise_conv_kernel_size"},
    flags=PLAIN.flags,
    absent={
        **PLAIN.absent,
        "position_embeddings_type": "relative",
        "rotary_embedding_base": 10000,
        "conv_depthwise_kernel_size": 31,
    },
)


def infer(shapes: Shapes) -> Layout[Own]:
    """Read the geometry off the names and shapes; see `convert.mapping.infer_layout`."""
    kind, prefix, encoder, head = infer_encoder(shapes, KINDS, "ffn1.w_1")
    layer = f"{prefix}encoder.layers.0."
    bias = shapes.get(f"{layer}self_attn.pos_bias_u")
    frequencies = shapes.get(f"{layer}self_attn.rotary_emb.inv_freq", ())[:1]
    rotary = encoder.hidden // (2 * frequencies[0]) if frequencies > (0,) else 0
    depthwise = [0, *shapes.get(f"{layer}conv_module.depthwise_conv.weight", ())][-1]
    own = Own(bias is not None, bias[0] if bias else rotary, depthwise, encoder.layers, encoder.hidden)
    return Layout("wav2vec2_conformer", kind, prefix, encoder, head, own)


def table(layout: Layout[Own], head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one model with conformer layers; see `convert.mapping.table`."""
    layers: tuple[Rule, ...] = LAYERS + (RELATIVE if layout.own.relative else ROTARY)
    return assemble(layout, head, edits, encoder_rules(layout.encoder, layers=layers), KINDS)


def _state(sources: Sources, layout: Layout[Own]) -> Layout[Own] | None:
    """State what conformer layers have; nothing for another attention, which is refused."""
    reader = sources.reader
    if reader.values.get("attn_type") != "espnet" or reader.values.get("pos_enc_type") not in POSITIONS:
        return None
    own = Own(
        relative=reader.values.get("pos_enc_type") == "rel_pos",
        heads=reader.get("encoder_attention_heads", int),
        depthwise=reader.get("depthwise_conv_kernel_size", int, SETTINGS.defaults["depthwise_conv_kernel_size"]),
        layers=layout.encoder.layers,
        hidden=layout.encoder.hidden,
    )
    return replace(layout, own=own)


def _values(sources: Sources) -> list[Value]:
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


def _from_config(config: Reader) -> dict[str, Any]:
    words = {value: key for key, value in POSITIONS.items()}
    given = config.get("position_embeddings_type", str, SETTINGS.absent["position_embeddings_type"])
    return from_config(config) | {"pos_enc_type": words.get(given, given)}


def _damages(model: Converted) -> Damages:
    made = encoder_damages(model, "self_attn.linear_{}", "ffn2", ("pos_bias_u", "inv_freq"))
    layer = f"{model.prefix}encoder.layers.{model.base.config.num_hidden_layers // 2}."
    made["a running variance lost"] = Change(f"{layer}conv_module.batch_norm.running_var", ones)
    made["gelu instead of swish"] = Configure({f"{model.part}hidden_act": "gelu"})
    frequencies = f"{model.prefix}encoder.embed_positions.inv_freq"
    if frequencies in model.weights:
        made["frequencies of the positions reversed"] = Change(frequencies, lambda value: value.copy_(value.flip(0)))
    else:
        biases = (f"{layer}self_attn.pos_bias_u", f"{layer}self_attn.pos_bias_v")
        made["pos_bias_u and pos_bias_v swapped"] = Exchange((biases,))
    return made


def _rounds(config: Any) -> str:
    """Of widths that are not a power of 4 the root is not a power of 2, and both what is done with it rounds."""
    width = config.hidden_size // config.num_attention_heads
    exact = width.bit_count() == 1 and width.bit_length() % 2 == 1
    return "" if exact else f"transformers multiplies scores by {width} ** -0.5, fairseq divides them by its root"


FAMILY = Family(
    name="wav2vec2_conformer",
    encoders=(("wav2vec2", "conformer"),),
    mark=r"^(w2v_encoder\.w2v_model\.)?encoder\.layers\.\d+\.conv_module\.",
    infer=infer,
    table=table,
    describe=describe_encoder,
    model_type="wav2vec2-conformer",
    classes={
        "ctc": "Wav2Vec2ConformerForCTC",
        "pretraining": "Wav2Vec2ConformerForPreTraining",
        "encoder": "Wav2Vec2ConformerModel",
    },
    kinds=KINDS,
    settings=SETTINGS,
    pads=False,
    state=_state,
    values=_values,
    paper=WAV2VEC2.paper,
    from_config=_from_config,
    damages=_damages,
    # transformers 5 chooses sdpa, which 4 does not have; a positional convolution is there, and neither framework uses it
    running=Running(attention="eager", usual="sdpa", rounds=_rounds, unused=frozenset({"pos_conv"})),
)
