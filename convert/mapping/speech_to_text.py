"""The conversion table of speech-to-text transformers (`fairseq.models.speech_to_text.S2TTransformerModel`), one line a tensor.

`source` is fairseq's whole key, `target` that of `Speech2TextForConditionalGeneration`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from convert.errors import PlanError, Problem
from convert.mapping.family import Family, Shapes
from convert.mapping.rules import Drop, Edit, Rename, Rule, Table

NAME = "speech_to_text"
# fmt: off
CONVOLUTIONS = (
    Rename("encoder.subsample.conv_layers.{conv}.weight",                "model.encoder.conv.conv_layers.{conv}.weight",               "conv_out.{conv} conv_in.{conv} conv_kernel.{conv}"),
    Rename("encoder.subsample.conv_layers.{conv}.bias",                  "model.encoder.conv.conv_layers.{conv}.bias",                 "conv_out.{conv}"),
)
ENCODER = (
    Rename("encoder.transformer_layers.{layer}.self_attn.{qkvo}_proj.weight", "model.encoder.layers.{layer}.self_attn.{qkvo}_proj.weight", "hidden hidden"),
    Rename("encoder.transformer_layers.{layer}.self_attn.{qkvo}_proj.bias", "model.encoder.layers.{layer}.self_attn.{qkvo}_proj.bias", "hidden"),
    Rename("encoder.transformer_layers.{layer}.self_attn_layer_norm.{p}", "model.encoder.layers.{layer}.self_attn_layer_norm.{p}",     "hidden"),
    Rename("encoder.transformer_layers.{layer}.fc1.weight",              "model.encoder.layers.{layer}.fc1.weight",                    "ffn hidden"),
    Rename("encoder.transformer_layers.{layer}.fc1.bias",                "model.encoder.layers.{layer}.fc1.bias",                      "ffn"),
    Rename("encoder.transformer_layers.{layer}.fc2.weight",              "model.encoder.layers.{layer}.fc2.weight",                    "hidden ffn"),
    Rename("encoder.transformer_layers.{layer}.fc2.bias",                "model.encoder.layers.{layer}.fc2.bias",                      "hidden"),
    Rename("encoder.transformer_layers.{layer}.final_layer_norm.{p}",    "model.encoder.layers.{layer}.final_layer_norm.{p}",          "hidden"),
    Rename("encoder.layer_norm.{p}",                                     "model.encoder.layer_norm.{p}",                               "hidden"),
)
DECODER = (
    Rename("decoder.embed_tokens.weight",                                "model.decoder.embed_tokens.weight",                          "vocab hidden"),
    Rename("decoder.layers.{decoder}.self_attn.{qkvo}_proj.weight",      "model.decoder.layers.{decoder}.self_attn.{qkvo}_proj.weight", "hidden hidden"),
    Rename("decoder.layers.{decoder}.self_attn.{qkvo}_proj.bias",        "model.decoder.layers.{decoder}.self_attn.{qkvo}_proj.bias",  "hidden"),
    Rename("decoder.layers.{decoder}.self_attn_layer_norm.{p}",          "model.decoder.layers.{decoder}.self_attn_layer_norm.{p}",    "hidden"),
    Rename("decoder.layers.{decoder}.encoder_attn.{qkvo}_proj.weight",   "model.decoder.layers.{decoder}.encoder_attn.{qkvo}_proj.weight", "hidden hidden"),
    Rename("decoder.layers.{decoder}.encoder_attn.{qkvo}_proj.bias",     "model.decoder.layers.{decoder}.encoder_attn.{qkvo}_proj.bias", "hidden"),
    Rename("decoder.layers.{decoder}.encoder_attn_layer_norm.{p}",       "model.decoder.layers.{decoder}.encoder_attn_layer_norm.{p}", "hidden"),
    Rename("decoder.layers.{decoder}.fc1.weight",                        "model.decoder.layers.{decoder}.fc1.weight",                  "decoder_ffn hidden"),
    Rename("decoder.layers.{decoder}.fc1.bias",                          "model.decoder.layers.{decoder}.fc1.bias",                    "decoder_ffn"),
    Rename("decoder.layers.{decoder}.fc2.weight",                        "model.decoder.layers.{decoder}.fc2.weight",                  "hidden decoder_ffn"),
    Rename("decoder.layers.{decoder}.fc2.bias",                          "model.decoder.layers.{decoder}.fc2.bias",                    "hidden"),
    Rename("decoder.layers.{decoder}.final_layer_norm.{p}",              "model.decoder.layers.{decoder}.final_layer_norm.{p}",        "hidden"),
    Rename("decoder.layer_norm.{p}",                                     "model.decoder.layer_norm.{p}",                               "hidden"),
    # also where it is the embedding itself: fairseq stores both, and transformers ties two that are equal
    Rename("decoder.output_projection.weight",                           "lm_head.weight",                                             "vocab hidden"),
)
CTC = (
    Drop("encoder.ctc_proj.weight",                "helps while training only (criterion label_smoothed_cross_entropy_with_ctc)", "vocab hidden"),
    Drop("encoder.ctc_proj.bias",                  "helps while training only (criterion label_smoothed_cross_entropy_with_ctc)", "vocab"),
)
RELICS = (
    Drop("decoder.version",                        "says which fairseq made the decoder: 3, since 2017",        "1", optional=True, constant=3.0),
    Drop("{side}.embed_positions._float_tensor",   "remembered a dtype, in fairseq until 2023",                 "1", optional=True, constant=0.0),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Layout:
    """The geometry that decides which tensors a speech-to-text transformer has. Nothing has a default.

    Args:
        family: `speech_to_text`.
        features: numbers a frame: `input_feat_per_channel` x `input_channels`.
        channels, kernels: channels of the convolutions but the last before their gate halves them, and every kernel.
        hidden: `encoder_embed_dim`, the decoder's too.
        ffn, layers: of the encoder.
        decoder_ffn, decoder_layers: of the decoder.
        vocab: symbols of the dictionary.
        ctc: whether the encoder has a CTC projection.
    """

    family: str
    features: int
    channels: int
    kernels: tuple[int, ...]
    hidden: int
    ffn: int
    layers: int
    decoder_ffn: int
    decoder_layers: int
    vocab: int
    ctc: bool


def build(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one model.

    Args:
        layout: the model's geometry.
        head: nothing: the model is always converted whole.
        edits: changes of single rows, see `Edit`.

    Raises:
        PlanError: `no-head`, when a part of the model was asked for.
    """
    if head not in ("", NAME):
        raise PlanError(
            f"a speech-to-text model is converted whole, not as {head}",
            code="no-head",
            key=head,
            hint="leave --head out",
        )
    rules: list[Rule] = [*CONVOLUTIONS, *ENCODER, *DECODER, *(CTC if layout.ctc else ()), *RELICS]
    axes: dict[str, tuple[object, ...]] = {
        "conv": tuple(range(len(layout.kernels))),
        "layer": tuple(range(layout.layers)),
        "decoder": tuple(range(layout.decoder_layers)),
        "qkvo": ("q", "k", "v", "out"),
        "p": ("weight", "bias"),
        "side": ("encoder", "decoder"),
    }
    sizes = {"hidden": layout.hidden, "ffn": layout.ffn, "decoder_ffn": layout.decoder_ffn, "vocab": layout.vocab}
    last = len(layout.kernels) - 1
    for index, kernel in enumerate(layout.kernels):
        sizes[f"conv_in.{index}"] = layout.channels // 2 if index else layout.features
        sizes[f"conv_out.{index}"] = layout.hidden * 2 if index == last else layout.channels
        sizes[f"conv_kernel.{index}"] = kernel
    return Table.build(NAME, rules, axes, sizes, edits)


def infer(shapes: Shapes) -> Layout:
    """Read the geometry off the names and shapes of a fairseq state_dict.

    Args:
        shapes: fairseq's keys with their shapes.

    Raises:
        PlanError: `missing-source`, when it is no speech-to-text transformer; `shape`, when a tensor has other axes.

    Example:
        >>> infer({})
        Traceback (most recent call last):
        convert.errors.PlanError: this is no speech-to-text transformer: 5 tensors that each has are missing
    """
    convolutions = _count(shapes, r"encoder\.subsample\.conv_layers\.(\d{1,3})\.weight")
    needed = {"encoder.transformer_layers.0.fc1.weight": 2, "decoder.layers.0.fc1.weight": 2}
    needed |= {"encoder.subsample.conv_layers.0.weight": 3, "encoder.layer_norm.weight": 1}
    needed |= {"decoder.embed_tokens.weight": 2}
    lost = [Problem("missing-source", key, "is not there") for key in needed if key not in shapes]
    if lost:
        message = f"this is no speech-to-text transformer: {len(lost)} tensors that each has are missing"
        raise PlanError(message, code="missing-source", problems=lost)
    kernels = [shapes.get(f"encoder.subsample.conv_layers.{index}.weight", (0, 0, 0)) for index in range(convolutions)]
    needed |= {f"encoder.subsample.conv_layers.{index}.weight": 3 for index in range(convolutions)}
    wrong = [
        Problem("shape", key, f"{rank} axes expected, source {shapes[key]}")
        for key, rank in needed.items()
        if key in shapes and len(shapes[key]) != rank
    ]
    if wrong:
        message = f"{len(wrong)} tensors have another number of axes than those of a speech-to-text transformer"
        raise PlanError(message, code="shape", problems=wrong)
    return Layout(
        family=NAME,
        features=kernels[0][1],
        channels=kernels[0][0],
        kernels=tuple(shape[2] for shape in kernels),
        hidden=shapes["encoder.layer_norm.weight"][0],
        ffn=shapes["encoder.transformer_layers.0.fc1.weight"][0],
        layers=_count(shapes, r"encoder\.transformer_layers\.(\d{1,3})\.fc1\.weight"),
        decoder_ffn=shapes["decoder.layers.0.fc1.weight"][0],
        decoder_layers=_count(shapes, r"decoder\.layers\.(\d{1,3})\.fc1\.weight"),
        vocab=shapes["decoder.embed_tokens.weight"][0],
        ctc="encoder.ctc_proj.weight" in shapes,
    )


def _count(keys: Mapping[str, object], pattern: str) -> int:
    found = [int(match[1]) for key in keys if (match := re.fullmatch(pattern, key))]
    return max(found, default=-1) + 1


FAMILY = Family(NAME, r"^encoder\.subsample\.conv_layers\.", infer, build)
