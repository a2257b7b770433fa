"""The conversion tables of sequence-to-sequence models: an encoder's rules, its own family's, and a decoder's, one line a tensor.

fairseq's `Wav2Vec2Seq2SeqModel` and `HubertSeq2SeqModel` have the same decoder (`wav2vec2_asr.TransformerDecoder`). In a
`SpeechEncoderDecoderModel` it is a `TrOCRForCausalLM` where it normalises after each block, and a `BlenderbotForCausalLM`
where it normalises before: the two differ in the output's name and in the rows of the positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from convert.errors import PlanError, Problem
from convert.mapping import hubert, wav2vec2
from convert.mapping.family import Family, Shapes
from convert.mapping.rules import Drop, Edit, Fill, Rename, Rule, Table

KIND = "seq2seq"
_COMPUTED = "fairseq computes its sinusoids, and transformers 5 leaves TrOCR's uncomputed when it loads a model"
_ROWS = "fairseq computes its sinusoids, Blenderbot has a table"
_NO_DECODER = "belongs to the decoder, and the bare encoder was asked for"

# fmt: off
PROJECTION = (  # both libraries have it exactly where the widths of the encoder and the decoder differ
    Rename("encoder.proj.weight",                                   "enc_to_dec_proj.weight",                                               "width hidden"),
    Rename("encoder.proj.bias",                                     "enc_to_dec_proj.bias",                                                 "width"),
)
DECODER = (
    Rename("decoder.embed_tokens.weight",                           "decoder.model.decoder.embed_tokens.weight",                            "vocab width"),
    Rename("decoder.layers.{block}.{attn}.{qkvo}_proj.weight",      "decoder.model.decoder.layers.{block}.{attn}.{qkvo}_proj.weight",       "width width"),
    Rename("decoder.layers.{block}.{attn}.{qkvo}_proj.bias",        "decoder.model.decoder.layers.{block}.{attn}.{qkvo}_proj.bias",         "width"),
    Rename("decoder.layers.{block}.{attn}_layer_norm.{p}",          "decoder.model.decoder.layers.{block}.{attn}_layer_norm.{p}",           "width"),
    Rename("decoder.layers.{block}.fc1.weight",                     "decoder.model.decoder.layers.{block}.fc1.weight",                      "width_ffn width"),
    Rename("decoder.layers.{block}.fc1.bias",                       "decoder.model.decoder.layers.{block}.fc1.bias",                        "width_ffn"),
    Rename("decoder.layers.{block}.fc2.weight",                     "decoder.model.decoder.layers.{block}.fc2.weight",                      "width width_ffn"),
    Rename("decoder.layers.{block}.fc2.bias",                       "decoder.model.decoder.layers.{block}.fc2.bias",                        "width"),
    Rename("decoder.layers.{block}.final_layer_norm.{p}",           "decoder.model.decoder.layers.{block}.final_layer_norm.{p}",            "width"),
    Drop("decoder.embed_positions._float_tensor",                   "an empty tensor that told fairseq the device until 2022",              optional=True, relic=True),
)
# both tables begin with two rows for fairseq's ids before the first position; TrOCR's offset skips them too
LEARNED = (
    Rename("decoder.embed_positions.weight",                        "decoder.model.decoder.embed_positions.weight",                         "rows width"),
)
SINUSOIDAL = (
    Fill("decoder.model.decoder.embed_positions.weight",            "sinusoids from row 0", _COMPUTED,                                      "rows width"),
)
OUTPUT = (
    Rename("decoder.embed_out",                                     "decoder.output_projection.weight",                                     "vocab width"),
)
# Blenderbot's table begins with the first position
PRE_NORM_LEARNED = (
    Rename("decoder.embed_positions.weight",                        "decoder.model.decoder.embed_positions.weight",                         "positions width", skip=2),
)
PRE_NORM_SINUSOIDAL = (
    Fill("decoder.model.decoder.embed_positions.weight",            "sinusoids from row 2", _ROWS,                                          "positions width"),
)
PRE_NORM = (
    Rename("decoder.layer_norm.{p}",                                "decoder.model.decoder.layer_norm.{p}",                                 "width"),
)
PRE_NORM_OUTPUT = (
    Rename("decoder.embed_out",                                     "decoder.lm_head.weight",                                               "vocab width"),
)
# fmt: on
ENCODERS = {family.name: family for family in (hubert.FAMILY, wav2vec2.FAMILY)}


@dataclass(frozen=True, slots=True)
class Layout:
    """The geometry that decides which tensors a sequence-to-sequence model has.

    Args:
        family, kind: `seq2seq`.
        encoder: the encoder's own layout; its kind is `seq2seq`, too.
        projection: whether there is a projection from the encoder to the decoder.
        width, ffn, blocks: `decoder_embed_dim`, `decoder_ffn_embed_dim`, `decoder_layers`.
        positions: `max_target_positions`; 0 where only the names and shapes are known, and positions are sinusoidal.
        learned: `decoder_learned_pos`.
        pre_norm: `decoder_normalize_before`.
        shared: `share_decoder_input_output_embed`.
        vocab: the number of symbols.
    """

    family: str
    kind: str
    encoder: wav2vec2.Layout
    projection: bool
    width: int
    ffn: int
    blocks: int
    positions: int
    learned: bool
    pre_norm: bool
    shared: bool
    vocab: int


def table(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one sequence-to-sequence model; see `convert.mapping.table`."""
    if head not in ("", KIND, "encoder"):
        raise PlanError(f"a {KIND} checkpoint has no {head} head", code="no-head", key=head, hint="--head encoder")
    encoder = ENCODERS[layout.encoder.family].build(layout.encoder, "encoder", ())
    rules, bare = decoder_rules(layout), head == "encoder"
    if bare:
        taken = [(rule.source, rule.shape) for rule in rules if isinstance(rule, Rename)]
        kept = [rule for rule in rules if isinstance(rule, Drop)]
        # learned positions have rows that Blenderbot leaves out: their shape does not matter here
        rules = [*kept, *(Drop(source, _NO_DECODER, "" if "positions" in shape else shape) for source, shape in taken)]
    decoder = Table.build("decoder", rules, _axes(layout), _dims(layout), () if bare else edits)
    return encoder.joined(decoder, f"{layout.encoder.family} {head or KIND}", "" if bare else "encoder.")


def decoder_rules(layout: Layout) -> list[Rule]:
    """Choose the rules of everything that is not the encoder."""
    chosen: list[Rule] = [*PROJECTION] if layout.projection else []
    chosen += DECODER
    if layout.pre_norm:
        chosen += (*PRE_NORM, *(PRE_NORM_LEARNED if layout.learned else PRE_NORM_SINUSOIDAL))
        chosen += () if layout.shared else PRE_NORM_OUTPUT
    else:
        chosen += LEARNED if layout.learned else SINUSOIDAL
        chosen += () if layout.shared else OUTPUT
    return chosen


def _axes(layout: Layout) -> dict[str, tuple[object, ...]]:
    return {
        "block": tuple(range(layout.blocks)),
        "attn": ("self_attn", "encoder_attn"),
        "qkvo": ("q", "k", "v", "out"),
        "p": ("weight", "bias"),
    }


def _dims(layout: Layout) -> dict[str, int]:
    sizes = {"hidden": layout.encoder.hidden, "width": layout.width, "width_ffn": layout.ffn, "vocab": layout.vocab}
    return sizes | {"positions": layout.positions, "rows": layout.positions + 2}


def infer_layout(shapes: Shapes) -> Layout:
    """Read the geometry of a sequence-to-sequence model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-source`, when it is no such model.
    """
    needed = ("decoder.embed_tokens.weight", "decoder.layers.0.fc1.weight")
    wrong = [
        Problem("missing-source", key, "no matrix of that name") for key in needed if len(shapes.get(key, ())) != 2
    ]
    if wrong:
        message = f"this is no sequence-to-sequence state_dict: {len(wrong)} tensors that each has are missing"
        raise PlanError(message, code="missing-source", problems=wrong)
    found = next((family for family in ENCODERS.values() if family.knows(shapes)), wav2vec2.FAMILY)
    learned = shapes.get("decoder.embed_positions.weight", ())
    blocks = [
        int(match[1]) for key in shapes if (match := re.fullmatch(r"decoder\.layers\.(\d{1,3})\.fc1\.weight", key))
    ]
    vocab, width = shapes[needed[0]]
    return Layout(
        family=KIND,
        kind=KIND,
        encoder=found.infer(shapes),
        projection="encoder.proj.weight" in shapes,
        width=width,
        ffn=shapes[needed[1]][0],
        blocks=max(blocks) + 1,
        positions=max(learned[0] - 2, 0) if learned else 0,
        learned=bool(learned),
        pre_norm="decoder.layer_norm.weight" in shapes,
        shared="decoder.embed_out" not in shapes,
        vocab=vocab,
    )


FAMILY = Family(KIND, r"^encoder\.w2v_model\.", infer_layout, table)
