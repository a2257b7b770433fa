"""Sequence-to-sequence models: an encoder of any family that has one, and fairseq's decoder, as a `SpeechEncoderDecoderModel`.

fairseq's `Wav2Vec2Seq2SeqModel` and `HubertSeq2SeqModel` have the same decoder (`wav2vec2_asr.TransformerDecoder`). It is a
`TrOCRForCausalLM` where it normalises after each block, and a `BlenderbotForCausalLM` where it normalises before: the two
differ in the output's name and in the rows of the positions. Settings: `Wav2Vec2Seq2SeqConfig`,
`fairseq.sequence_generator.SequenceGenerator`, `transformers.TrOCRConfig`, `BlenderbotConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from convert.errors import PlanError
from convert.families import hubert, wav2vec2
from convert.families.base import Conversion, Family, Kind, Running, Shapes, Sources
from convert.families.damages import Absent, Change, Configure, Converted, Damages, Generate, blocks, pair, roll
from convert.families.encoder import Layout as EncoderLayout
from convert.families.encoder import check_ranks, count
from convert.families.encoder_settings import check_heads, encoder_config
from convert.families.interface import Interface, encoder_interface
from convert.families.planning import classify, encoder_layout, finish, prove, read_dictionary, too_many
from convert.families.settings import Limit, Settings, Value, carried, off, refuse_limited
from convert.families.tokenizers import Processor, make_processor, make_sequence_processor, sequence_decoding
from convert.rules import Drop, Edit, Fill, Rename, Rule, Sinusoids, Table

NAME = "seq2seq"
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
    Fill("decoder.model.decoder.embed_positions.weight",            Sinusoids(0),         _COMPUTED,                                      "rows width"),
)
OUTPUT = (
    Rename("decoder.embed_out",                                     "decoder.output_projection.weight",                                     "vocab width"),
)
# Blenderbot's table begins with the first position
PRE_NORM_LEARNED = (
    Rename("decoder.embed_positions.weight",                        "decoder.model.decoder.embed_positions.weight",                         "positions width", skip=2),
)
PRE_NORM_SINUSOIDAL = (
    Fill("decoder.model.decoder.embed_positions.weight",            Sinusoids(2),         _ROWS,                                          "positions width"),
)
PRE_NORM = (
    Rename("decoder.layer_norm.{p}",                                "decoder.model.decoder.layer_norm.{p}",                                 "width"),
)
PRE_NORM_OUTPUT = (
    Rename("decoder.embed_out",                                     "decoder.lm_head.weight",                                               "vocab width"),
)
# fmt: on
CLASS = "SpeechEncoderDecoderModel"
MAX_LENGTH = 200  # SequenceGenerator's max_len_b
ENCODERS = (hubert.FAMILY, wav2vec2.FAMILY)


@dataclass(frozen=True, slots=True)
class Layout:
    """The geometry that decides which tensors a sequence-to-sequence model has.

    Args:
        family: `seq2seq`.
        encoder: the encoder's own layout.
        projection: whether there is a projection from the encoder to the decoder.
        width, ffn, blocks: `decoder_embed_dim`, `decoder_ffn_embed_dim`, `decoder_layers`.
        positions: `max_target_positions`; 0 where only the names and shapes are known, and positions are sinusoidal.
        learned: `decoder_learned_pos`.
        pre_norm: `decoder_normalize_before`.
        shared: `share_decoder_input_output_embed`.
        vocab: the number of symbols.
    """

    family: str
    encoder: EncoderLayout[Any]
    projection: bool
    width: int
    ffn: int
    blocks: int
    positions: int
    learned: bool
    pre_norm: bool
    shared: bool
    vocab: int


# fmt: off
SAME = {
    "decoder_embed_dim":          "d_model",
    "decoder_layers":             "decoder_layers",
    "decoder_attention_heads":    "decoder_attention_heads",
    "decoder_ffn_embed_dim":      "decoder_ffn_dim",
    "max_target_positions":       "max_position_embeddings",
    "decoder_dropout":            "dropout",
    "decoder_attention_dropout":  "attention_dropout",
    "decoder_activation_dropout": "activation_dropout",
    "decoder_layerdrop":          "decoder_layerdrop",
}
# fmt: on
_COUNTS = tuple(SAME)[:5]
_DEFAULTS: dict[str, Any] = {"max_target_positions": 2048} | dict.fromkeys(tuple(SAME)[5:], 0.0)
_LIMITS = (Limit("no_token_positional_embeddings", off, "TrOCR and Blenderbot always add positions"),)
_FLAGS = ("decoder_learned_pos", "decoder_normalize_before", "share_decoder_input_output_embed")
SETTINGS = Settings(  # those of the decoder
    same=SAME,
    choices={},
    limits=_LIMITS,
    read=frozenset({*SAME, *_FLAGS, *(limit.field for limit in _LIMITS), "apply_mask", "normalize"}),
    # `final_dropout` acts between the encoder and the decoder, where transformers has none
    training_only=frozenset({"final_dropout", "reset_dict", "seq2seq_path"}),
    defaults=_DEFAULTS,
    counts=frozenset(_COUNTS),
)
SEQ2SEQ = Kind(NAME, nested=True, read=frozenset(SETTINGS.read), task="audio_finetuning")


def table(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one sequence-to-sequence model; see `convert.mapping.table`."""
    if head not in ("", NAME, "encoder"):
        raise PlanError(f"a {NAME} checkpoint has no {head} head", code="no-head", key=head, hint="--head encoder")
    family = next(family for family in ENCODERS if family.name == layout.encoder.family)
    encoder = family.table(layout.encoder, "encoder", ())
    rules, bare = decoder_rules(layout), head == "encoder"
    if bare:
        taken = [(rule.source, rule.shape) for rule in rules if isinstance(rule, Rename)]
        kept = [rule for rule in rules if isinstance(rule, Drop)]
        # learned positions have rows that Blenderbot leaves out: their shape does not matter here
        rules = [*kept, *(Drop(source, _NO_DECODER, "" if "positions" in shape else shape) for source, shape in taken)]
    decoder = Table.build("decoder", rules, _axes(layout), _dims(layout), () if bare else edits)
    return encoder.joined(decoder, f"{layout.encoder.family} {head or NAME}", "" if bare else "encoder.")


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
    sizes = {
        "hidden": layout.encoder.encoder.hidden,
        "width": layout.width,
        "width_ffn": layout.ffn,
        "vocab": layout.vocab,
    }
    return sizes | {"positions": layout.positions, "rows": layout.positions + 2}


def infer(shapes: Shapes) -> Layout:
    """Read the geometry of a sequence-to-sequence model off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-tensor`, when it is not such a model.
    """
    embedding, first = "decoder.embed_tokens.weight", "decoder.layers.0.fc1.weight"
    check_ranks(shapes, "sequence-to-sequence state_dict", {embedding: 2, first: 2}, {})
    alike = [key.removeprefix("encoder.w2v_model.") for key in shapes]
    found = next(family for family in ENCODERS if family.knows(alike) or family.general)
    learned = shapes.get("decoder.embed_positions.weight", ())
    vocab, width = shapes[embedding]
    return Layout(
        family=NAME,
        encoder=found.infer(shapes),
        projection="encoder.proj.weight" in shapes,
        width=width,
        ffn=shapes[first][0],
        blocks=count(shapes, r"decoder\.layers\.(\d{1,3})\.fc1\.weight"),
        positions=max(learned[0] - 2, 0) if learned else 0,
        learned=bool(learned),
        pre_norm="decoder.layer_norm.weight" in shapes,
        shared="decoder.embed_out" not in shapes,
        vocab=vocab,
    )


def describe(sources: Sources) -> Conversion:
    """Decide everything about the conversion of a sequence-to-sequence model.

    Raises:
        PlanError: every problem of settings, vocabulary, names and shapes at once.
    """
    family, bare = sources.family, sources.head == "encoder"
    if sources.head not in (NAME, "encoder"):
        raise PlanError(
            f"a {NAME} checkpoint has no {sources.head} head", code="no-head", key=sources.head, hint="--head encoder"
        )
    fields = replace(
        family.settings, training_only=(family.settings.training_only | SETTINGS.training_only) - SETTINGS.read
    )
    training_only = classify(sources, fields)
    sources.dictionary = read_dictionary(sources, "decoder.embed_tokens.weight")
    config = encoder_config(sources) + family.values(sources)
    decoder = _decoder(sources)
    if bare:
        processor = make_processor(None, {}, sources.task, sources.problems)
    else:
        processor = _processor(sources)
        config = [replace(value, name=f"encoder.{value.name}") for value in config]
        config.append(Value("encoder.model_type", family.model_type, "the class"))
        config += [replace(value, name=f"decoder.{value.name}") for value in decoder]
        config += _both(sources)
    complete = not any(problem.code in ("missing-setting", "bad-setting") for problem in sources.problems)
    proved = prove(sources, _layout(sources) if complete else None, table=table)
    target = family.classes["encoder"] if bare else CLASS
    model_type = family.model_type if bare else FAMILY.model_type
    sidecars = family.sidecars(sources)
    return finish(sources, proved, target, config, training_only, processor, sidecars, model_type)


def _decoder(sources: Sources) -> list[Value]:
    """The values of the decoder's part of `config.json`."""
    outer = sources.outer
    values = carried(outer, SETTINGS)
    refuse_limited(outer.values, SETTINGS.limits, sources.problems)
    check_heads(sources, outer, "decoder_attention_heads", "decoder_embed_dim")
    width = outer.get("decoder_embed_dim", int)
    if width < 4:
        sources.refuse("bad-setting", "decoder_embed_dim", f"fairseq has no sinusoids for a width of {width}")
    pre_norm = outer.get("decoder_normalize_before", bool, False)
    origin = outer.origin("decoder_normalize_before")
    values.append(Value("model_type", "blenderbot" if pre_norm else "trocr", origin))
    if pre_norm:  # transformers reads the number of layers and of heads under the encoder's names
        fixed = {target: value.value for target, value in zip(SAME.values(), values, strict=False)}
        names = {"layers": "decoder_layers", "attention_heads": "decoder_attention_heads", "ffn_dim": "decoder_ffn_dim"}
        values += [Value(f"encoder_{name}", fixed[own], "the decoder's") for name, own in names.items()]
        values.append(Value("encoder_no_repeat_ngram_size", 0, "SequenceGenerator forbids no repetition"))
        values.append(Value("is_encoder_decoder", False, "the class"))
    else:
        values.append(Value("layernorm_embedding", False, "TransformerDecoder has no norm on its embeddings"))
        # sinusoids are written as if they had been learned
        values.append(Value("use_learned_position_embeddings", True, outer.origin("decoder_learned_pos")))
    shared = outer.get("share_decoder_input_output_embed", bool, False)
    return [
        *values,
        Value("activation_function", "relu", "TransformerConfig.activation_fn's default"),
        Value("add_cross_attention", True, "the class"),
        Value("is_decoder", True, "the class"),
        Value("scale_embedding", True, "TransformerDecoder.embed_scale"),
        Value("tie_word_embeddings", shared, outer.origin("share_decoder_input_output_embed")),
        Value("vocab_size", len(sources.dictionary or ()), "dictionary"),
        *_ids(),
    ]


def _both(sources: Sources) -> list[Value]:
    """The values that belong to neither of the two parts."""
    tied = Value("tie_word_embeddings", False, "the encoder and the decoder share nothing")
    return [Value("is_encoder_decoder", True, "the class"), *_ids(), tied]


def _ids() -> list[Value]:
    ids = {"bos_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    why = "fairseq's Dictionary; SequenceGenerator starts with </s>"
    return [Value(name, value, why) for name, value in ids.items()]


def _processor(sources: Sources) -> Processor:
    made = make_sequence_processor(sources.dictionary, sources.task, sources.problems, sources.request.post_process)
    longest = min(
        MAX_LENGTH, sources.outer.get("max_target_positions", int, SETTINGS.defaults["max_target_positions"]) - 1
    )
    generation = generation_config(longest)
    return replace(made, files={**made.files, "generation_config.json": generation})


def generation_config(longest: int) -> dict[str, Any]:
    """What `SequenceGenerator` does beside choosing the best: with it, `generate()` gives the same tokens.

    Args:
        longest: the most tokens, neither the start nor the end counted.
    """
    return {
        "bos_token_id": 0,
        "decoder_start_token_id": 2,
        "eos_token_id": 2,
        "forced_eos_token_id": 2,  # at the greatest length
        "max_length": longest + 2,
        "min_new_tokens": 1,  # min_len
        "pad_token_id": 1,
        "suppress_tokens": [1],  # never <pad>
    }


def _layout(sources: Sources) -> Layout | None:
    """State the geometry from the settings."""
    outer, encoder = sources.outer, encoder_layout(sources)
    width, blocks = outer.get("decoder_embed_dim", int), outer.get("decoder_layers", int)
    if too_many(sources, outer, "decoder_layers") or encoder is None:
        return None
    embeddings = sources.checkpoint.inventory.get("decoder.embed_tokens.weight")
    rows = (embeddings.shape if embeddings else ()) or (0,)
    return Layout(
        family=NAME,
        encoder=encoder,
        projection=width != encoder.encoder.hidden,
        width=width,
        ffn=outer.get("decoder_ffn_embed_dim", int),
        blocks=blocks,
        positions=outer.get("max_target_positions", int, SETTINGS.defaults["max_target_positions"]),
        learned=outer.get("decoder_learned_pos", bool, False),
        pre_norm=outer.get("decoder_normalize_before", bool, False),
        shared=outer.get("share_decoder_input_output_embed", bool, False),
        vocab=len(sources.dictionary or ()) or rows[0],
    )


def _damages(model: Converted) -> Damages:
    encoder = next(family for family in ENCODERS if family.model_type == model.base.config.model_type)
    config, decoder = model.model.config.decoder, "decoder.model.decoder."
    last, heads = config.decoder_layers - 1, config.decoder_attention_heads
    attention, wrong = f"{decoder}layers.{last}.encoder_attn.", heads // 2 if heads % 2 == 0 else 1
    generation = model.model.generation_config
    suppressed = [index for index in range(config.vocab_size) if index != generation.eos_token_id]
    return {
        **encoder.damages(model),
        f"q and k of the cross-attention in the decoder's layer {last} swapped": pair(
            f"{attention}q_proj", f"{attention}k_proj"
        ),
        f"the decoder's layers 0 and {last} exchanged": blocks(model.weights, f"{decoder}layers.", last)
        if last
        else Absent("the decoder has one layer"),
        "the decoder's positions moved by one": Change(f"{decoder}embed_positions.weight", roll),
        "the decoder's embeddings not scaled": Configure({"decoder.scale_embedding": False}),
        "nothing but the end of the text generated": Generate({"min_new_tokens": None, "suppress_tokens": suppressed}),
        f"{wrong} attention heads in the decoder instead of {heads}": Configure(
            {"decoder.decoder_attention_heads": wrong}
        )
        if heads > 1
        else Absent("the decoder has one attention head"),
    }


def _interface(sources: Sources, made: Conversion) -> Interface:
    """Describe the same as of an encoder; a decoder has no blank."""
    around = encoder_interface(sources, made)
    decoding = sequence_decoding(around.symbols, sources.task.values, sources.request.post_process)
    return replace(around, blank=-1, post_process=decoding)


FAMILY = Family(
    name=NAME,
    architectures={"wav2vec_seq2seq": SEQ2SEQ, "hubert_seq2seq": SEQ2SEQ},
    inside=ENCODERS,
    mark=r"^encoder\.w2v_model\.",
    infer=infer,
    table=table,
    describe=describe,
    model_type="speech-encoder-decoder",
    classes={NAME: CLASS},
    settings=SETTINGS,
    generates=True,
    damages=_damages,
    interface=_interface,
    running=Running(
        attention={"encoder": "sdpa", "decoder": "eager"},  # TrOCR has no other
        rounds=lambda config: "fairseq's attention multiplies in another order than the decoders of transformers",
    ),
)
