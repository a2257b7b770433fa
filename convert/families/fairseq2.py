"""fairseq2's wav2vec 2.0 (`Wav2Vec2Model`, `Wav2Vec2AsrModel`), Omnilingual ASR's CTC models among them: transformers' Wav2Vec2.

Sources: `fairseq2.models.wav2vec2`, 0.4 to 0.8; `transformers.Wav2Vec2Config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from convert.errors import PlanError, Problem
from convert.families.base import NO_HEAD, Conversion, Family, Kind, Part, Shapes, Sources
from convert.families.ctc import Symbols
from convert.families.encoder import Encoder, Layout, anchor, check_ranks, count
from convert.families.encoder_settings import check_heads
from convert.families.fairseq2_processor import make_piece_processor
from convert.families.planning import classify, finish, prove, too_many
from convert.families.settings import Limit, Reader, Settings, Value, carried, off, only
from convert.families.wav2vec2 import Quantizer
from convert.rules import Drop, Edit, Fill, Identity, Rename, Rule, Table, Zeros, add_prefix

# fmt: off
FRONTEND = (
    Rename("encoder_frontend.feature_extractor.layers.{conv}.conv.weight",      "feature_extractor.conv_layers.{conv}.conv.weight",                 "conv_dim.{conv} conv_in.{conv} conv_kernel.{conv}"),
    Rename("encoder_frontend.post_extract_layer_norm.{p}",                      "feature_projection.layer_norm.{p}",                                "features"),
    Rename("encoder_frontend.pos_encoder.conv.bias",                            "encoder.pos_conv_embed.conv.bias",                                 "hidden"),
    Rename("encoder_frontend.pos_encoder.conv.weight_g",                        "encoder.pos_conv_embed.conv.parametrizations.weight.original0",    "1 1 conv_pos"),
    Rename("encoder_frontend.pos_encoder.conv.weight_v",                        "encoder.pos_conv_embed.conv.parametrizations.weight.original1",    "hidden pos_group conv_pos"),
)
CONVOLUTION_BIASES = (
    Rename("encoder_frontend.feature_extractor.layers.{conv}.conv.bias",        "feature_extractor.conv_layers.{conv}.conv.bias",                   "conv_dim.{conv}"),
)
GROUP_NORM = (  # on convolution 0 only
    Rename("encoder_frontend.feature_extractor.layers.0.group_norm.{p}",        "feature_extractor.conv_layers.0.layer_norm.{p}",                   "conv_dim.0"),
)
LAYER_NORM = (
    Rename("encoder_frontend.feature_extractor.layers.{conv}.layer_norm.{p}",   "feature_extractor.conv_layers.{conv}.layer_norm.{p}",              "conv_dim.{conv}"),
)
PROJECTION = (
    Rename("encoder_frontend.model_dim_proj.weight",                            "feature_projection.projection.weight",                             "hidden features"),
    Rename("encoder_frontend.model_dim_proj.bias",                              "feature_projection.projection.bias",                               "hidden"),
)
NO_PROJECTION = (
    Fill("feature_projection.projection.weight", Identity(), "the checkpoint has no model_dim_proj: the widths agree", "hidden features"),
    Fill("feature_projection.projection.bias",   Zeros(),    "the checkpoint has no model_dim_proj: the widths agree", "hidden"),
)
MASK = (
    Rename("masker.temporal_mask_embed",                                        "masked_spec_embed",                                                "hidden"),
)
POST_NORM = (  # before the layers
    Rename("encoder_frontend.layer_norm.{p}",                                   "encoder.layer_norm.{p}",                                           "hidden"),
)
PRE_NORM = (  # after the layers
    Rename("encoder.layer_norm.{p}",                                            "encoder.layer_norm.{p}",                                           "hidden"),
)
LAYERS = (
    Rename("encoder.layers.{layer}.self_attn.{qkv}_proj.weight",                "encoder.layers.{layer}.attention.{qkv}_proj.weight",               "hidden hidden"),
    Rename("encoder.layers.{layer}.self_attn.{qkv}_proj.bias",                  "encoder.layers.{layer}.attention.{qkv}_proj.bias",                 "hidden"),
    Rename("encoder.layers.{layer}.self_attn.output_proj.weight",               "encoder.layers.{layer}.attention.out_proj.weight",                 "hidden hidden"),
    Rename("encoder.layers.{layer}.self_attn.output_proj.bias",                 "encoder.layers.{layer}.attention.out_proj.bias",                   "hidden"),
    Rename("encoder.layers.{layer}.self_attn_layer_norm.{p}",                   "encoder.layers.{layer}.layer_norm.{p}",                            "hidden"),
    Rename("encoder.layers.{layer}.ffn.inner_proj.weight",                      "encoder.layers.{layer}.feed_forward.intermediate_dense.weight",    "ffn hidden"),
    Rename("encoder.layers.{layer}.ffn.inner_proj.bias",                        "encoder.layers.{layer}.feed_forward.intermediate_dense.bias",      "ffn"),
    Rename("encoder.layers.{layer}.ffn.output_proj.weight",                     "encoder.layers.{layer}.feed_forward.output_dense.weight",          "hidden ffn"),
    Rename("encoder.layers.{layer}.ffn.output_proj.bias",                       "encoder.layers.{layer}.feed_forward.output_dense.bias",            "hidden"),
    Rename("encoder.layers.{layer}.ffn_layer_norm.{p}",                         "encoder.layers.{layer}.final_layer_norm.{p}",                      "hidden"),
)
CTC_HEAD = (
    Rename("final_proj.weight",                                                 "lm_head.weight",                                                   "vocab hidden"),
    Rename("final_proj.bias",                                                   "lm_head.bias",                                                     "vocab"),
)
QUANTIZER_HEAD = (
    Rename("quantizer.entries",                                                 "quantizer.codevectors",                                            "1 codes code_width"),
    Rename("quantizer.entry_proj.weight",                                       "quantizer.weight_proj.weight",                                     "codes features"),
    Rename("quantizer.entry_proj.bias",                                         "quantizer.weight_proj.bias",                                       "codes"),
    Rename("final_target_proj.weight",                                          "project_q.weight",                                                 "final codevector"),
    Rename("final_target_proj.bias",                                            "project_q.bias",                                                   "final"),
    Rename("final_proj.weight",                                                 "project_hid.weight",                                               "final hidden"),
)
STEPS = (
    Drop("quantizer.num_updates", "counts the steps of training, on which the temperature of sampling depends"),
)
FINAL_BIAS = (
    Rename("final_proj.bias",                                                   "project_hid.bias",                                                 "final"),
)
NO_FINAL_BIAS = (
    Fill("project_hid.bias", Zeros(), "the checkpoint's final_proj has no bias", "final"),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Own(Part):
    """What fairseq2 decides apart from one another.

    Args:
        post_norm: whether the encoder's norm comes before its layers.
        mask: whether there is a mask embedding.
        final_bias: whether the head's projection has a bias.
    """

    post_norm: bool
    mask: bool
    final_bias: bool

    @property
    def axes(self) -> Mapping[str, Sequence[object]]:
        """The values of the axis of the attention's inputs."""
        return {"qkv": ("q", "k", "v")}


def _measure_symbols(shapes: Shapes) -> Symbols:
    return Symbols(shapes.get("final_proj.weight", (0,))[0])


def _state_symbols(sources: Sources, seen: Part) -> Symbols:
    return Symbols(sources.reader.get("target_vocab_size", int))


def _measure_quantizer(shapes: Shapes) -> Quantizer:
    _, codes, width = shapes.get("quantizer.entries", (0, 0, 0))
    return Quantizer(codes, width, shapes.get("final_target_proj.weight", (0, 0))[1], shapes["final_proj.weight"][0])


def _state_quantizer(sources: Sources, seen: Part) -> Quantizer:
    reader = sources.reader
    books, width = reader.get("num_codebooks", int), reader.get("quantized_dim", int)
    codes = books * reader.get("num_codebook_entries", int)
    return Quantizer(codes, width // books, width, reader.get("final_dim", int))


CTC = Kind("ctc", rules=CTC_HEAD, measure=_measure_symbols, state=_state_symbols, symbols="final_proj.bias")
PRETRAINING = Kind("pretraining", rules=QUANTIZER_HEAD, measure=_measure_quantizer, state=_state_quantizer)
KINDS = {kind.name: kind for kind in (CTC, PRETRAINING)}


def table(layout: Layout[Own], head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one model; see `convert.mapping.table`."""
    encoder, own, kind = layout.encoder, layout.own, KINDS[layout.kind]
    head = head or kind.name
    if head not in (kind.name, "encoder"):
        hint = f"--head {kind.name} or --head encoder"
        raise PlanError(f"a {kind.name} checkpoint has no {head} head", code="no-head", key=head, hint=hint)
    rules: list[Rule] = [*FRONTEND]
    rules += CONVOLUTION_BIASES if encoder.conv_bias else ()
    rules += GROUP_NORM if encoder.group_norm else LAYER_NORM
    rules += PROJECTION if encoder.projection else NO_PROJECTION
    rules += MASK if own.mask else ()
    rules += POST_NORM if own.post_norm else PRE_NORM
    rules = add_prefix([*rules, *LAYERS], target="" if head == "encoder" else "wav2vec2.")
    of_head: list[Rule] = [*kind.rules]
    if kind is PRETRAINING:
        of_head += [*STEPS, *(FINAL_BIAS if own.final_bias else NO_FINAL_BIAS)]
    if head == "encoder":
        of_head = [Drop(rule.source, NO_HEAD, rule.shape) for rule in of_head if not isinstance(rule, Fill)]
    return Table.build(f"fairseq2 {head}", [*rules, *of_head], layout.axes, layout.dims, edits)


def infer(shapes: Shapes) -> Layout[Own]:
    """Read the geometry of a model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-tensor`, `shape`: it is not such a model.
    """
    front, layer = "encoder_frontend.", "encoder.layers.0.ffn.inner_proj.weight"
    needed = {f"{front}feature_extractor.layers.0.conv.weight": 3, layer: 2, f"{front}pos_encoder.conv.weight_v": 3}
    needed |= {f"{front}post_extract_layer_norm.weight": 1, "final_proj.weight": 2}
    others = {"quantizer.entries": 3, "final_target_proj.weight": 2}
    others |= {key: 3 for key in shapes if re.fullmatch(rf"{front}feature_extractor\.layers\.\d+\.conv\.weight", key)}
    check_ranks(shapes, "fairseq2 wav2vec 2.0 state_dict", needed, others)
    kind = KINDS["pretraining" if "quantizer.entries" in shapes else "ctc"]
    convolutions = count(shapes, rf"{front}feature_extractor\.layers\.(\d{{1,3}})\.conv\.weight")
    kernels = [shapes.get(f"{front}feature_extractor.layers.{i}.conv.weight", (0, 0, 0)) for i in range(convolutions)]
    (ffn, hidden), positions = shapes[layer], shapes[f"{front}pos_encoder.conv.weight_v"]
    encoder = Encoder(
        convolutions=tuple((shape[0], shape[2]) for shape in kernels),
        group_norm=f"{front}feature_extractor.layers.0.group_norm.weight" in shapes,
        conv_bias=f"{front}feature_extractor.layers.0.conv.bias" in shapes,
        projection=f"{front}model_dim_proj.weight" in shapes,
        weight_norm=True,
        hidden=hidden,
        ffn=ffn,
        layers=count(shapes, r"encoder\.layers\.(\d{1,3})\.ffn\.inner_proj\.weight"),
        conv_pos=positions[2],
        pos_group=positions[1],
    )
    own = Own(
        f"{front}layer_norm.weight" in shapes, "masker.temporal_mask_embed" in shapes, "final_proj.bias" in shapes
    )
    return Layout("fairseq2", kind.name, "", encoder, kind.measure(shapes), own)


# fmt: off
_SAME = {
    "model_dim":                    "hidden_size",
    "num_encoder_layers":           "num_hidden_layers",
    "num_encoder_attn_heads":       "num_attention_heads",
    "ffn_inner_dim":                "intermediate_size",
    "feature_extractor_bias":       "conv_bias",
    "pos_conv_kernel_size":         "num_conv_pos_embeddings",
    "num_pos_conv_groups":          "num_conv_pos_embedding_groups",
    "dropout_p":                    "hidden_dropout",
    "attn_dropout_p":               "attention_dropout",
    "ffn_inner_dropout_p":          "activation_dropout",
    "first_pass_dropout_p":         "feat_proj_dropout",
    "layer_drop_p":                 "layerdrop",
    "max_temporal_mask_prob":       "mask_time_prob",
    "temporal_mask_span_len":       "mask_time_length",
    "min_num_temporal_mask_spans":  "mask_time_min_masks",
    "max_spatial_mask_prob":        "mask_feature_prob",
    "spatial_mask_span_len":        "mask_feature_length",
    "min_num_spatial_mask_spans":   "mask_feature_min_masks",
}
_SAME_CTC = {
    "target_vocab_size":            "vocab_size",
    "final_dropout_p":              "final_dropout",
    "use_masking":                  "apply_spec_augment",
}
_SAME_PRETRAINING = {
    "final_dim":                    "proj_codevector_dim",
    "quantized_dim":                "codevector_dim",
    "num_codebooks":                "num_codevector_groups",
    "num_codebook_entries":         "num_codevectors_per_group",
    "num_distractors":              "num_negatives",
    "logit_temp":                   "contrastive_logits_temperature",
}
_LIMITS = (
    Limit("use_fbank",         off,            "Wav2Vec2Model takes waveforms"),
    Limit("use_conformer",     off,            "Wav2Vec2Model has transformer layers"),
    Limit("pos_encoder_type",  only("conv"),   "Wav2Vec2Model has a convolution for its positions", required=True),
    Limit("pos_encoder_depth", only(1),        "Wav2Vec2Model has one positional convolution"),
    Limit("norm_order",        only("PRE", "POST"), "Wav2Vec2Model has one norm before or after each part of a layer", required=True),
)
# fmt: on
_COUNTS = {
    *("model_dim", "num_encoder_layers", "num_encoder_attn_heads", "ffn_inner_dim", "pos_conv_kernel_size"),
    *("num_pos_conv_groups", "temporal_mask_span_len", "spatial_mask_span_len", "target_vocab_size", "final_dim"),
    *("quantized_dim", "num_codebooks", "num_codebook_entries", "num_distractors"),
}
_FLAGS = {"feature_extractor_bias", "use_masking"}
_READ = {"_name", "feature_dim", "feature_extractor_layer_descs", "feature_extractor_layer_norm_convs"}
_READ |= {"layer_norm_features", "final_proj_bias"}
# without effect on the result, or without a counterpart that acts in training
_TRAINING_ONLY = {
    *("max_seq_len", "feature_grad_scale", "codebook_sampling_temperature", "quantizer_encoder_grad"),
    *("num_fbank_channels", "fbank_stride", "sample_fbank_every_k", "depthwise_conv_kernel_size"),  # of what is refused
}
SETTINGS = Settings(
    same=_SAME,
    choices={},
    limits=_LIMITS,
    read=_READ,
    training_only=_TRAINING_ONLY,
    defaults={},
    counts=_COUNTS,
    whole=frozenset({"min_num_temporal_mask_spans", "min_num_spatial_mask_spans"}),
    flags=_FLAGS,
)
_OWN = {"ctc": _SAME_CTC, "pretraining": _SAME_PRETRAINING}


def describe(sources: Sources) -> Conversion:
    """Decide everything about the conversion of a fairseq2 checkpoint.

    Raises:
        PlanError: every problem of settings, tokenizer, names and shapes at once.
    """
    reader, origin = sources.reader, str(sources.task.values.get("settings_from"))
    reader.origins.update(dict.fromkeys(reader.values, origin))
    settings = replace(SETTINGS, same=_SAME | _OWN[sources.kind.name])
    training_only = classify(sources, settings)
    config = _config(sources, settings)
    layout = None if any(problem.code.endswith("-setting") for problem in sources.problems) else _layout(sources)
    processor = make_piece_processor(sources)
    config += [Value(key, value, "the tokenizer") for key, value in processor.ids.items()]
    proved = prove(sources, layout)
    return finish(sources, proved, sources.family.classes.get(sources.head, ""), config, training_only, processor)


def _config(sources: Sources, settings: Settings) -> list[Value]:
    reader = sources.reader
    values = carried(reader, settings)
    convolutions, origin = _convolutions(reader), reader.origin("feature_extractor_layer_descs")
    values += [
        Value("conv_dim", [channels for channels, _, _ in convolutions], origin),
        Value("conv_kernel", [kernel for _, kernel, _ in convolutions], origin),
        Value("conv_stride", [stride for _, _, stride in convolutions], origin),
        Value("num_feat_extract_layers", len(convolutions), origin),
    ]
    norms, order = "feature_extractor_layer_norm_convs", reader.get("norm_order", str)
    values += [
        Value("feat_extract_norm", "layer" if reader.get(norms, bool) else "group", reader.origin(norms)),
        Value("do_stable_layer_norm", order == "PRE", reader.origin("norm_order")),
        Value("hidden_act", "gelu", "Wav2Vec2EncoderFactory always uses GELU"),
        Value("feat_extract_activation", "gelu", "Wav2Vec2FeatureExtractionLayer always uses GELU"),
        Value("layer_norm_eps", 1e-5, "StandardLayerNorm's default"),
    ]
    if sources.kind is CTC:
        values += [
            Value("ctc_loss_reduction", "sum", "Wav2Vec2AsrModel sums"),
            Value("ctc_zero_infinity", True, "Wav2Vec2AsrModel always does"),
        ]
        if not reader.get("use_masking", bool):  # transformers has a mask embedding where a probability is positive
            off = {"mask_time_prob", "mask_feature_prob"}
            values = [
                replace(one, value=0.0, origin="use_masking is off") if one.name in off else one for one in values
            ]
    else:
        first = "first_pass_dropout_p"
        values.append(Value("apply_spec_augment", True, "Wav2Vec2Model always masks in training"))
        values.append(Value("feat_quantizer_dropout", reader.get(first, float), reader.origin(first)))
    _check(sources, order, convolutions)
    return values


def _check(sources: Sources, order: str, convolutions: Sequence[tuple[int, int, int]]) -> None:
    reader = sources.reader
    check_heads(sources, reader, "num_encoder_attn_heads", "model_dim")
    early = reader.get("layer_norm_features", bool)
    if early == (order == "PRE") and order in ("PRE", "POST"):
        found = "norms before and after its layers" if early else "a norm neither before nor after its layers"
        sources.refuse("unsupported-setting", "layer_norm_features", f"an encoder with {found}: Wav2Vec2Model has one")
    if convolutions and convolutions[-1][0] != reader.get("feature_dim", int):
        detail = f"is {reader.get('feature_dim', int)}, and the last convolution has {convolutions[-1][0]} channels"
        sources.refuse("bad-setting", "feature_dim", detail)


def _convolutions(reader: Reader) -> list[tuple[int, int, int]]:
    """Read (channels, kernel, stride) of every convolution."""
    name = "feature_extractor_layer_descs"
    value = reader.get(name, list)
    right = all(
        isinstance(one, list) and len(one) == 3 and all(type(n) is int and 0 < n < 1 << 20 for n in one)
        for one in value
    )
    if not 0 < len(value) <= 64 or not right:
        if name in reader.values:
            detail = f"a list of [channels, kernel, stride] expected, {str(value)[:60]} found"
            reader.problems.append(Problem("bad-setting", name, detail))
        return []
    return [(one[0], one[1], one[2]) for one in value]


def _layout(sources: Sources) -> Layout[Own] | None:
    """State the geometry from the settings."""
    reader, inventory = sources.reader, sources.checkpoint.inventory
    try:
        seen = infer({name: spec.shape for name, spec in inventory.items()})
    except PlanError as error:
        sources.problems.extend(error.reasons)
        return None
    hidden, convolutions = reader.get("model_dim", int), _convolutions(reader)
    if too_many(sources, reader, "num_encoder_layers"):
        return None
    encoder = Encoder(
        convolutions=tuple((channels, kernel) for channels, kernel, _ in convolutions),
        group_norm=not reader.get("feature_extractor_layer_norm_convs", bool),
        conv_bias=reader.get("feature_extractor_bias", bool),
        projection=convolutions[-1][0] != hidden,
        weight_norm=True,
        hidden=hidden,
        ffn=reader.get("ffn_inner_dim", int),
        layers=reader.get("num_encoder_layers", int),
        conv_pos=reader.get("pos_conv_kernel_size", int),
        pos_group=hidden // reader.get("num_pos_conv_groups", int),
    )
    pretraining = sources.kind is PRETRAINING
    own = Own(
        post_norm=reader.get("norm_order", str) == "POST",
        mask=pretraining or reader.get("use_masking", bool),
        final_bias=not pretraining or reader.get("final_proj_bias", bool),
    )
    return replace(seen, encoder=encoder, head=sources.kind.state(sources, seen.head), own=own)


FAMILY = Family(
    name="fairseq2",
    architectures={"fairseq2.wav2vec2": PRETRAINING, "fairseq2.wav2vec2_asr": CTC},
    mark=r"^encoder_frontend\.",
    # the second of models that take filter banks, which have no convolutions
    anchors=tuple(anchor(rule, LAYERS[0], trainer="fairseq2") for rule in FRONTEND[:2]),
    infer=infer,
    table=table,
    describe=describe,
    model_type="wav2vec2",
    classes={"ctc": "Wav2Vec2ForCTC", "pretraining": "Wav2Vec2ForPreTraining", "encoder": "Wav2Vec2Model"},
    kinds=KINDS,
    settings=SETTINGS,
    convolutions=_convolutions,
    restores=False,
    pads=False,
    trainer="facebookresearch/fairseq2",
)
