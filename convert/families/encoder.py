"""The encoder that wav2vec 2.0 and what is built like it share: its tensors, one line each, and its geometry.

`source` is relative to fairseq's encoder, `target` to Hugging Face's base model; `assemble` adds the prefixes of both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from convert.checkpoint import Anchor
from convert.errors import PlanError, Problem
from convert.families.base import NO_HEAD, Kind, Part, Shapes
from convert.rules import Drop, Edit, Fill, Identity, NormOf, Rename, Rule, Table, Zeros, add_prefix


def anchor(first: Rename, layer: Rename, inner: str = "", trainer: str = "fairseq") -> Anchor:
    """Make what shows a model in files of other programs, of two rules.

    Args:
        first: a rule of a tensor that every model has.
        layer: a rule of a tensor of its layers.
        inner: what stands before both in the model.
        trainer: the project whose trainer writes it.

    Example:
        >>> first = Rename("conv_layers.{conv}.{p}", "convolutions.{conv}.{p}", "hidden")
        >>> anchor(first, Rename("layers.{layer}.fc1.bias", "layers.{layer}.fc1.bias", "ffn"), "encoder.").key
        'encoder.conv_layers.0.weight'
    """
    key = first.source.replace("{p}", "weight")
    return Anchor(f"{inner}{re.sub('{[^}]*}', '0', key)}", inner + layer.source.partition("{")[0], inner, trainer)


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
    Fill("feature_projection.projection.weight", Identity(), "the checkpoint has no post_extract_proj: the widths agree",          "hidden features"),
    Fill("feature_projection.projection.bias",   Zeros(),    "the checkpoint has no post_extract_proj: the widths agree",          "hidden"),
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
    Fill("encoder.pos_conv_embed.conv.parametrizations.weight.original0", NormOf("encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
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
# fmt: on
# kind of checkpoint -> what stands before the encoder's keys; no kind: of an encoder inside a larger model
PREFIXES = {"ctc": "w2v_encoder.w2v_model.", "classification": "w2v_encoder.w2v_model.", "pretraining": ""}
PREFIXES |= {"": "encoder.w2v_model."}
# what shows such an encoder, alone or in a larger model
ANCHORS = tuple(anchor(CONVOLUTIONS[0], LAYERS[0], prefix) for prefix in dict.fromkeys(PREFIXES.values()))
Own = TypeVar("Own", bound=Part, covariant=True)


@dataclass(frozen=True, slots=True)
class Encoder(Part):
    """The geometry that decides which tensors an encoder has. Nothing has a default: all of it is stated.

    Args:
        convolutions: (output channels, kernel) of every feature convolution.
        group_norm: whether convolution 0 has a group norm; otherwise each has a layer norm.
        conv_bias: whether the feature convolutions have biases.
        projection: whether there is a `post_extract_proj`.
        weight_norm: whether the positional convolution still has its weight norm.
        hidden, ffn, layers: `encoder_embed_dim`, `encoder_ffn_embed_dim`, `encoder_layers`.
        conv_pos, pos_group: kernel of the positional convolution, and its input channels a group.
    """

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

    @property
    def axes(self) -> dict[str, tuple[object, ...]]:
        """The values of every axis that the rules name."""
        indices = {"conv": tuple(range(len(self.convolutions))), "layer": tuple(range(self.layers))}
        return {**indices, "qkvo": ("q", "k", "v", "out"), "p": ("weight", "bias")}

    @property
    def dims(self) -> dict[str, int]:
        """The size of every dimension that the rules name."""
        channels = [1, *(channel for channel, _ in self.convolutions)]
        sizes = {"features": channels[-1], "hidden": self.hidden, "ffn": self.ffn}
        sizes |= {"conv_pos": self.conv_pos, "pos_group": self.pos_group}
        for index, (channel, kernel) in enumerate(self.convolutions):
            sizes |= {f"conv_in.{index}": channels[index], f"conv_dim.{index}": channel, f"conv_kernel.{index}": kernel}
        return sizes


@dataclass(frozen=True, slots=True)
class Layout(Generic[Own]):
    """The geometry of a model that is an encoder, perhaps with a head.

    Args:
        family: the family's name, such as `wav2vec2`.
        kind: what the checkpoint is, such as `ctc` (`Wav2VecCtc`) or `pretraining` (`Wav2Vec2Model`); empty for an
            encoder inside a larger model.
        prefix: what stands before the encoder's keys.
        encoder: what every family has.
        head: what the head has.
        own: what this family alone has.
    """

    family: str
    kind: str
    prefix: str
    encoder: Encoder
    head: Part
    own: Own

    @property
    def axes(self) -> dict[str, Sequence[object]]:
        """The values of every axis that the rules name."""
        return {**self.encoder.axes, **self.head.axes, **self.own.axes}

    @property
    def dims(self) -> dict[str, int]:
        """The size of every dimension that the rules name."""
        return {**self.encoder.dims, **self.head.dims, **self.own.dims}


def encoder_rules(
    encoder: Encoder, positions: Sequence[Rule] | None = None, layers: Sequence[Rule] = LAYERS
) -> list[Rule]:
    """Choose the rules of everything below the head, without prefixes.

    Args:
        encoder: its geometry.
        positions: the rules of the positional convolution; by default those of one with weight norm, there or removed.
        layers: the rules of what follows it.
    """
    weight_norm = POSITIONS if encoder.weight_norm else POSITIONS_PLAIN
    chosen: list[Rule] = [*CONVOLUTIONS]
    chosen += CONVOLUTION_BIASES if encoder.conv_bias else ()
    chosen += GROUP_NORM if encoder.group_norm else LAYER_NORM
    chosen += FEATURES_NORM
    chosen += PROJECTION if encoder.projection else NO_PROJECTION
    chosen += MASK
    chosen += weight_norm if positions is None else positions
    chosen += layers
    return chosen


def assemble(
    layout: Layout[Part],
    head: str,
    edits: Iterable[Edit],
    rules: Iterable[Rule],
    kinds: Mapping[str, Kind],
    base: str = "",
) -> Table:
    """Join the rules of an encoder and of a head, with the prefixes of both sides.

    Args:
        layout: the model's geometry.
        head: the head that is asked for; `encoder` for none, empty for what the checkpoint is.
        edits: changes of single rows of the head.
        rules: everything below the head, without prefixes.
        kinds: the kinds of checkpoint that the family has.
        base: the target's base prefix, where it is not the family's name.

    Raises:
        PlanError: `no-head`, when there is no such head.
    """
    kind = kinds.get(layout.kind, Kind(layout.kind))
    base = base or layout.family
    native = kind.name if kind.rules else "encoder"
    head = head or native
    if head not in (native, "encoder"):
        lacks = f"a {kind.name} checkpoint has no {head} head"
        raise PlanError(
            f"transformers has no class for the {head} head of {base}" if head == kind.name else lacks,
            code="no-head",
            key=head,
            hint="--head encoder" if native == "encoder" else f"--head {native} or --head encoder",
        )
    bare = head == "encoder"
    dropped = kind.drops or [Drop(rule.source, NO_HEAD, rule.shape, optional=True) for rule in kind.rules]
    chosen = add_prefix(rules, source=layout.prefix, target="" if bare else f"{base}.")
    chosen += dropped if bare else kind.rules
    return Table.build(f"{base} {head}", chosen, layout.axes, layout.dims, () if bare else edits)


def kind_of(shapes: Shapes) -> tuple[str, str]:
    """Tell the kind of checkpoint that keys are from, and what stands before the encoder's."""
    marks = {"encoder.w2v_model.": "", "pooling_layer.": "classification", "w2v_encoder.": "ctc"}
    kind = next((kind for mark, kind in marks.items() if any(key.startswith(mark) for key in shapes)), "pretraining")
    return kind, PREFIXES[kind]


def infer_encoder(shapes: Shapes, kinds: Mapping[str, Kind], inner: str = "fc1") -> tuple[str, str, Encoder, Part]:
    """Read the geometry of an encoder and its head off names and shapes.

    Args:
        shapes: fairseq's keys with their shapes.
        kinds: the kinds of checkpoint that the family has.
        inner: the layers' linear map from `hidden` to `ffn`.

    Returns:
        The kind of checkpoint, what stands before the encoder's keys, the encoder's geometry, and the head's.

    Raises:
        PlanError: `missing-tensor`, when there is no such encoder; `shape`, when a tensor has another number of axes.
    """
    kind, prefix = kind_of(shapes)
    known = kinds.get(kind, Kind(kind))
    encoder = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    weight_norm = "encoder.pos_conv.0.weight" not in encoder
    positions = f"encoder.pos_conv.0.weight{'_v' if weight_norm else ''}"
    first = f"encoder.layers.0.{inner}.weight"
    needed = {"feature_extractor.conv_layers.0.0.weight": 3, first: 2, positions: 3, "layer_norm.weight": 1}
    convolution = re.compile(r"feature_extractor\.conv_layers\.\d+\.0\.weight")
    others = {prefix + key: 3 for key in encoder if convolution.fullmatch(key)} | dict(known.ranks)
    check_ranks(shapes, "wav2vec 2.0 state_dict", {prefix + key: rank for key, rank in needed.items()}, others)
    convolutions = count(encoder, r"feature_extractor\.conv_layers\.(\d{1,3})\.0\.weight")
    kernels = [encoder.get(f"feature_extractor.conv_layers.{i}.0.weight", (0, 0, 0)) for i in range(convolutions)]
    ffn, hidden = encoder[first]
    geometry = Encoder(
        convolutions=tuple((shape[0], shape[2]) for shape in kernels),
        group_norm="feature_extractor.conv_layers.0.2.weight" in encoder,
        conv_bias="feature_extractor.conv_layers.0.0.bias" in encoder,
        projection="post_extract_proj.weight" in encoder,
        weight_norm=weight_norm,
        hidden=hidden,
        ffn=ffn,
        layers=count(encoder, rf"encoder\.layers\.(\d{{1,3}})\.{re.escape(inner)}\.weight"),
        conv_pos=encoder[positions][2],
        pos_group=encoder[positions][1],
    )
    return kind, prefix, geometry, known.measure(shapes)


def count(keys: Iterable[str], pattern: str) -> int:
    """Count what keys number from 0 on; the pattern's group is the number."""
    found = [int(match[1]) for key in keys if (match := re.fullmatch(pattern, key))]
    return max(found, default=-1) + 1


def check_ranks(shapes: Shapes, model: str, needed: Mapping[str, int], others: Mapping[str, int]) -> None:
    """Refuse a state_dict that is not one of a model.

    Args:
        shapes: the state_dict.
        model: what it should be, for the error.
        needed: tensors that every such model has, with their numbers of axes.
        others: tensors that some have, with theirs.

    Raises:
        PlanError: `missing-tensor`, `shape`.
    """
    lost = [Problem("missing-tensor", key, "is not there") for key in needed if key not in shapes]
    if lost:
        message = f"this is not a {model}: {len(lost)} tensors that every such model has are missing"
        raise PlanError(message, code="missing-tensor", problems=lost)
    wrong = [
        Problem("shape", key, f"{rank} axes expected, source {shapes[key]}")
        for key, rank in {**needed, **others}.items()
        if key in shapes and len(shapes[key]) != rank
    ]
    if wrong:
        message = f"{len(wrong)} tensors have a different number of axes than in a {model}"
        raise PlanError(message, code="shape", problems=wrong)
