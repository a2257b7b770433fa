"""The conversion tables of wav2vec 2.0 (`fairseq.models.wav2vec.Wav2Vec2Model`, `Wav2VecCtc`), one line a tensor.

`source` is relative to fairseq's encoder, `target` to Hugging Face's base model; `assemble` adds the prefixes. Families
that are built like wav2vec 2.0 take what they share from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from convert.errors import PlanError, Problem
from convert.mapping.family import Family, Shapes
from convert.mapping.rules import Drop, Edit, Fill, Rename, Rule, Table, under

# fmt: off
CONVOLUTIONS = (
    Rename("feature_extractor.conv_layers.{conv}.0.weight",        "feature_extractor.conv_layers.{conv}.conv.weight",             "conv_dim.{conv} conv_in.{conv} conv_kernel.{conv}"),
)
CONVOLUTION_BIASES = (
    Rename("feature_extractor.conv_layers.{conv}.0.bias",          "feature_extractor.conv_layers.{conv}.conv.bias",               "conv_dim.{conv}"),
)
GROUP_NORM = (  # extractor_mode="default": a norm on convolution 0 only
    Rename("feature_extractor.conv_layers.0.2.{p}",                "feature_extractor.conv_layers.0.layer_norm.{p}",               "conv_dim.0"),
)
LAYER_NORM = (  # extractor_mode="layer_norm": TransposeLast, Fp32LayerNorm, TransposeLast
    Rename("feature_extractor.conv_layers.{conv}.2.1.{p}",         "feature_extractor.conv_layers.{conv}.layer_norm.{p}",          "conv_dim.{conv}"),
)
FEATURES_NORM = (
    Rename("layer_norm.{p}",                                       "feature_projection.layer_norm.{p}",                            "features"),
)
PROJECTION = (
    Rename("post_extract_proj.weight",                             "feature_projection.projection.weight",                         "hidden features"),
    Rename("post_extract_proj.bias",                               "feature_projection.projection.bias",                           "hidden"),
)
NO_PROJECTION = (  # fairseq builds none when the widths agree; Hugging Face always has one
    Fill("feature_projection.projection.weight", "identity", "the checkpoint has no post_extract_proj: the widths agree",          "hidden features"),
    Fill("feature_projection.projection.bias",   "zeros",    "the checkpoint has no post_extract_proj: the widths agree",          "hidden"),
)
MASK = (
    Rename("mask_emb",                                             "masked_spec_embed",                                            "hidden"),
)
POSITIONS = (
    Rename("encoder.pos_conv.0.bias",                              "encoder.pos_conv_embed.conv.bias",                             "hidden"),
    Rename("encoder.pos_conv.0.weight_g",                          "encoder.pos_conv_embed.conv.parametrizations.weight.original0", "1 1 conv_pos"),
    Rename("encoder.pos_conv.0.weight_v",                          "encoder.pos_conv_embed.conv.parametrizations.weight.original1", "hidden pos_group conv_pos"),
)
POSITIONS_PLAIN = (  # weight norm was removed: its direction is the weight, its magnitude the weight's norm
    Rename("encoder.pos_conv.0.bias",                              "encoder.pos_conv_embed.conv.bias",                             "hidden"),
    Rename("encoder.pos_conv.0.weight",                            "encoder.pos_conv_embed.conv.parametrizations.weight.original1", "hidden pos_group conv_pos"),
    Fill("encoder.pos_conv_embed.conv.parametrizations.weight.original0", "norm of encoder.pos_conv_embed.conv.parametrizations.weight.original1",
         "weight norm was removed from the positional convolution", "1 1 conv_pos"),
)
LAYERS = (
    Rename("encoder.layers.{layer}.self_attn.{qkvo}_proj.weight",  "encoder.layers.{layer}.attention.{qkvo}_proj.weight",          "hidden hidden"),
    Rename("encoder.layers.{layer}.self_attn.{qkvo}_proj.bias",    "encoder.layers.{layer}.attention.{qkvo}_proj.bias",            "hidden"),
    Rename("encoder.layers.{layer}.self_attn_layer_norm.{p}",      "encoder.layers.{layer}.layer_norm.{p}",                        "hidden"),
    Rename("encoder.layers.{layer}.fc1.weight",                    "encoder.layers.{layer}.feed_forward.intermediate_dense.weight", "ffn hidden"),
    Rename("encoder.layers.{layer}.fc1.bias",                      "encoder.layers.{layer}.feed_forward.intermediate_dense.bias",  "ffn"),
    Rename("encoder.layers.{layer}.fc2.weight",                    "encoder.layers.{layer}.feed_forward.output_dense.weight",      "hidden ffn"),
    Rename("encoder.layers.{layer}.fc2.bias",                      "encoder.layers.{layer}.feed_forward.output_dense.bias",        "hidden"),
    Rename("encoder.layers.{layer}.final_layer_norm.{p}",          "encoder.layers.{layer}.final_layer_norm.{p}",                  "hidden"),
    Rename("encoder.layer_norm.{p}",                               "encoder.layer_norm.{p}",                                       "hidden"),
)
CTC_HEAD = (
    Rename("w2v_encoder.proj.weight",                              "lm_head.weight",                                               "vocab hidden"),
    Rename("w2v_encoder.proj.bias",                                "lm_head.bias",                                                 "vocab"),
)
CLASSIFICATION_HEAD = (  # MeanPoolingFast
    Rename("pooling_layer.linear.weight",                          "projector.weight",                                             "latent hidden"),
    Rename("pooling_layer.linear.bias",                            "projector.bias",                                               "latent"),
    Rename("pooling_layer.projection.weight",                      "classifier.weight",                                            "vocab latent"),
    Rename("pooling_layer.projection.bias",                        "classifier.bias",                                              "vocab"),
)
QUANTIZER_HEAD = (
    Rename("quantizer.vars",                                       "quantizer.codevectors",                                        "1 codes code_width"),
    Rename("quantizer.weight_proj.weight",                         "quantizer.weight_proj.weight",                                 "codes features"),
    Rename("quantizer.weight_proj.bias",                           "quantizer.weight_proj.bias",                                   "codes"),
    Rename("project_q.weight",                                     "project_q.weight",                                             "final codevector"),
    Rename("project_q.bias",                                       "project_q.bias",                                               "final"),
    Rename("final_proj.weight",                                    "project_hid.weight",                                           "final hidden"),
    Rename("final_proj.bias",                                      "project_hid.bias",                                             "final"),
)
NO_HEAD = "belongs to the head, and the bare encoder was asked for"
PRETRAINING_DROPS = (
    Drop("quantizer.vars",                          NO_HEAD, optional=True),
    Drop("quantizer.weight_proj.{p}",               NO_HEAD, optional=True),
    Drop("quantizer.weight_proj.{depth}.{p}",       NO_HEAD, optional=True),  # quantizer_depth > 1: the last projection
    Drop("quantizer.weight_proj.{depth}.0.{p}",     NO_HEAD, optional=True),  # and the ones before it
    Drop("project_q.{p}",                           NO_HEAD, optional=True),
    Drop("final_proj.{p}",                          NO_HEAD, optional=True),
    Drop("target_glu.0.{p}",                        NO_HEAD, optional=True),
)
CLASSIFICATION_DROPS = (
    Drop("pooling_layer.linear.{p}",                NO_HEAD, optional=True),
    Drop("pooling_layer.projection.{p}",            NO_HEAD, optional=True),
    Drop("pooling_layer.weights",                   NO_HEAD, optional=True),  # LayerWeightedMeanPooling
)
# fmt: on
HEADS = {"ctc": CTC_HEAD, "classification": CLASSIFICATION_HEAD, "pretraining": QUANTIZER_HEAD}
DROPS = {"classification": CLASSIFICATION_DROPS, "pretraining": PRETRAINING_DROPS}
# what stands before the encoder's keys in each kind of checkpoint
PREFIXES = {"ctc": "w2v_encoder.w2v_model.", "classification": "w2v_encoder.w2v_model.", "pretraining": ""}
PREFIXES |= {"seq2seq": "encoder.w2v_model."}
# the tensor with one row for each symbol of the dictionary
SYMBOLS = {"ctc": "w2v_encoder.proj.bias", "classification": "pooling_layer.projection.weight"}


@dataclass(frozen=True, slots=True)
class Layout:
    """The geometry that decides which tensors a wav2vec 2.0 model has. Nothing has a default: all of it is stated.

    Args:
        family: the target's base prefix, such as `wav2vec2`.
        kind: what the checkpoint is, such as `ctc` (`Wav2VecCtc`) or `pretraining` (`Wav2Vec2Model`).
        convolutions: (output channels, kernel) of every feature convolution.
        group_norm: whether convolution 0 has a group norm; otherwise each has a layer norm.
        conv_bias: whether the feature convolutions have biases.
        projection: whether there is a `post_extract_proj`.
        weight_norm: whether the positional convolution still has its weight norm.
        hidden, ffn, layers: `encoder_embed_dim`, `encoder_ffn_embed_dim`, `encoder_layers`.
        conv_pos, pos_group: kernel of the positional convolution, and its input channels a group.
        vocab: rows of the CTC projection, or of the classifier; 0 without one.
        latent: width between the two layers of a classifier, 0 without one.
        codes, code_width, codevector, final: rows of the codebook (groups x variables), width of one code, width of a
            quantized vector, width of the contrastive space; all 0 without a quantizer.
    """

    family: str
    kind: str
    convolutions: tuple[tuple[int, int], ...]
    group_norm: bool
    conv_bias: bool
    projection: bool
    weight_norm: bool
    hidden: int
    ffn: int
    layers: int
    conv_pos: int
    pos_group: int
    vocab: int
    latent: int
    codes: int
    code_width: int
    codevector: int
    final: int


def assemble(
    layout: Layout,
    head: str,
    edits: Iterable[Edit],
    *,
    encoder: Sequence[Rule],
    heads: Mapping[str, Sequence[Rename]],
    drops: Mapping[str, Sequence[Drop]],
    axes: Mapping[str, Sequence[object]],
    dims: Mapping[str, int],
) -> Table:
    """Join the rules of an encoder and of a head, with the prefixes of both sides.

    Args:
        layout: the model's geometry.
        head: the head that is asked for; `encoder` for none, empty for what the checkpoint is.
        edits: changes of single rows of the head.
        encoder: everything below the head, without prefixes.
        heads: kind of checkpoint -> its head, where transformers has it too; complete keys on both sides.
        drops: kind of checkpoint -> what is left out when the head is; by default the head itself.
        axes, dims: as for `Table.build`.

    Raises:
        PlanError: `no-head`, when there is no such head.
    """
    native = layout.kind if layout.kind in heads else "encoder"
    head = head or native
    if head not in (native, "encoder"):
        lacks = f"a {layout.kind} checkpoint has no {head} head"
        raise PlanError(
            f"transformers has no class for the {head} head of {layout.family}" if head == layout.kind else lacks,
            code="no-head",
            key=head,
            hint="--head encoder" if native == "encoder" else f"--head {native} or --head encoder",
        )
    bare = head == "encoder"
    rules = under(encoder, source=PREFIXES[layout.kind], target="" if bare else f"{layout.family}.")
    rules += (
        drops.get(layout.kind, [Drop(rule.source, NO_HEAD, rule.shape) for rule in heads.get(layout.kind, ())])
        if bare
        else heads[layout.kind]
    )
    return Table.build(f"{layout.family} {head}", rules, axes, dims, () if bare else edits)


def table(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one wav2vec 2.0 model.

    Args:
        layout: the model's geometry.
        head: `ctc` (target `Wav2Vec2ForCTC`), `classification` (`Wav2Vec2ForSequenceClassification`), `pretraining`
            (`Wav2Vec2ForPreTraining`) or `encoder` (`Wav2Vec2Model`); by default what the checkpoint is.
        edits: changes of single rows, see `Edit`.

    Raises:
        PlanError: `no-head`, when the checkpoint does not have the head that was asked for.

    Example:
        >>> from convert.mapping import infer_layout, table
        >>> # table(infer_layout(shapes)).rename_key("w2v_encoder.proj.bias") gives "lm_head.bias"
    """
    rules = encoder_rules(layout)
    return assemble(layout, head, edits, encoder=rules, heads=HEADS, drops=DROPS, axes=axes(layout), dims=dims(layout))


def encoder_rules(
    layout: Layout, positions: Sequence[Rule] | None = None, layers: Sequence[Rule] = LAYERS
) -> list[Rule]:
    """Choose the rules of everything below the head, without prefixes.

    Args:
        layout: the model's geometry.
        positions: the rules of the positional convolution; by default those of one with weight norm, there or removed.
        layers: the rules of what follows it.
    """
    weight_norm = POSITIONS if layout.weight_norm else POSITIONS_PLAIN
    chosen: list[Rule] = [*CONVOLUTIONS]
    chosen += CONVOLUTION_BIASES if layout.conv_bias else ()
    chosen += GROUP_NORM if layout.group_norm else LAYER_NORM
    chosen += FEATURES_NORM
    chosen += PROJECTION if layout.projection else NO_PROJECTION
    chosen += MASK
    chosen += weight_norm if positions is None else positions
    chosen += layers
    return chosen


def axes(layout: Layout) -> dict[str, tuple[object, ...]]:
    """Return the values of every axis that the rules name."""
    return {
        "conv": tuple(range(len(layout.convolutions))),
        "layer": tuple(range(layout.layers)),
        "qkvo": ("q", "k", "v", "out"),
        "p": ("weight", "bias"),
        "depth": tuple(range(8)),
    }


def dims(layout: Layout) -> dict[str, int]:
    """Return the size of every dimension that the rules name."""
    channels = [1, *(channel for channel, _ in layout.convolutions)]
    sizes = {"features": channels[-1], "hidden": layout.hidden, "ffn": layout.ffn, "vocab": layout.vocab}
    sizes |= {
        "latent": layout.latent,
        "conv_pos": layout.conv_pos,
        "pos_group": layout.pos_group,
        "codes": layout.codes,
    }
    sizes |= {"code_width": layout.code_width, "codevector": layout.codevector, "final": layout.final}
    for index, (channel, kernel) in enumerate(layout.convolutions):
        sizes |= {f"conv_in.{index}": channels[index], f"conv_dim.{index}": channel, f"conv_kernel.{index}": kernel}
    return sizes


def kind_of(shapes: Shapes) -> str:
    """Name the kind of checkpoint that these keys are from."""
    marks = {"encoder.w2v_model.": "seq2seq", "pooling_layer.": "classification", "w2v_encoder.": "ctc"}
    return next((kind for mark, kind in marks.items() if any(key.startswith(mark) for key in shapes)), "pretraining")


def infer_layout(shapes: Shapes, family: str = "wav2vec2", inner: str = "fc1") -> Layout:
    """Read the geometry of a wav2vec 2.0 model off its names and shapes; see `convert.mapping.infer_layout`.

    Args:
        shapes: fairseq's keys with their shapes.
        family: the target's base prefix.
        inner: the layers' linear map from `hidden` to `ffn`.

    Raises:
        PlanError: `missing-source`, when it is no wav2vec 2.0 model.

    Example:
        >>> infer_layout({})
        Traceback (most recent call last):
        convert.errors.PlanError: this is no wav2vec 2.0 state_dict: 4 tensors that each has are missing
    """
    kind = kind_of(shapes)
    prefix = PREFIXES[kind]
    encoder = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    weight_norm = "encoder.pos_conv.0.weight" not in encoder
    positions = f"encoder.pos_conv.0.weight{'_v' if weight_norm else ''}"
    first = f"encoder.layers.0.{inner}.weight"
    needed = ["feature_extractor.conv_layers.0.0.weight", first, positions, "layer_norm.weight"]
    lost = [prefix + key for key in needed if key not in encoder]
    if lost:
        problems = [Problem("missing-source", key, "is not there") for key in lost]
        message = f"this is no wav2vec 2.0 state_dict: {len(lost)} tensors that each has are missing"
        raise PlanError(message, code="missing-source", problems=problems)
    ranks = {needed[0]: 3, needed[1]: 2, needed[2]: 3, needed[3]: 1}
    ranks |= {key: 3 for key in encoder if re.fullmatch(r"feature_extractor\.conv_layers\.\d+\.0\.weight", key)}
    ranks |= {"quantizer.vars": 3, "project_q.weight": 2, "final_proj.bias": 1, "w2v_encoder.proj.bias": 1}
    ranks |= {"pooling_layer.linear.weight": 2, "pooling_layer.projection.weight": 2}
    wrong = [
        Problem("shape", key if key in shapes else prefix + key, f"{rank} axes expected, source {shape}")
        for key, rank in ranks.items()
        if (shape := shapes.get(key) if key in shapes else encoder.get(key)) is not None and len(shape) != rank
    ]
    if wrong:
        message = f"{len(wrong)} tensors have another number of axes than those of wav2vec 2.0"
        raise PlanError(message, code="shape", problems=wrong)
    convolutions = _count(encoder, r"feature_extractor\.conv_layers\.(\d{1,3})\.0\.weight")
    kernels = [encoder.get(f"feature_extractor.conv_layers.{i}.0.weight", (0, 0, 0)) for i in range(convolutions)]
    codes = encoder.get("quantizer.vars", (0, 0, 0))
    ffn, hidden = encoder[first]
    return Layout(
        family=family,
        kind=kind,
        convolutions=tuple((shape[0], shape[2]) for shape in kernels),
        group_norm="feature_extractor.conv_layers.0.2.weight" in encoder,
        conv_bias="feature_extractor.conv_layers.0.0.bias" in encoder,
        projection="post_extract_proj.weight" in encoder,
        weight_norm=weight_norm,
        hidden=hidden,
        ffn=ffn,
        layers=_count(encoder, rf"encoder\.layers\.(\d{{1,3}})\.{re.escape(inner)}\.weight"),
        conv_pos=encoder[positions][2],
        pos_group=encoder[positions][1],
        vocab=shapes.get(SYMBOLS.get(kind, ""), (0,))[0],
        latent=shapes.get("pooling_layer.linear.weight", (0,))[0],
        codes=codes[1],
        code_width=codes[2],
        codevector=encoder.get("project_q.weight", (0, 0))[1],
        final=encoder.get("final_proj.bias", (0,))[0],
    )


def _count(keys: Iterable[str], pattern: str) -> int:
    found = [int(match[1]) for key in keys if (match := re.fullmatch(pattern, key))]
    return max(found, default=-1) + 1


FAMILY = Family("wav2vec2", r"feature_extractor\.conv_layers\.", infer_layout, table)
