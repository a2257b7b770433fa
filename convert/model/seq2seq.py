"""Sequence-to-sequence models: an encoder of any family that has one, and fairseq's decoder, as a `SpeechEncoderDecoderModel`.

Sources: `fairseq.models.wav2vec.wav2vec2_asr.Wav2Vec2Seq2SeqConfig` and `TransformerDecoder` (HuBERT's are the same),
`fairseq.sequence_generator.SequenceGenerator`; and `transformers.TrOCRConfig`, `BlenderbotConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from convert.checkpoint import Checkpoint
from convert.errors import PlanError
from convert.mapping.seq2seq import KIND, Layout
from convert.model.encoder import (
    Family,
    Kind,
    Sources,
    classify,
    encoder_config,
    encoder_layout,
    encoder_settings,
    family_of,
    finish,
    prove,
    read_dictionary,
)
from convert.model.fields import Limit, off
from convert.model.processor import Processor, make_processor, make_sequence_processor
from convert.model.settings import MISSING, Reader
from convert.model.types import Model, Request, Value

CLASS = "SpeechEncoderDecoderModel"
MAX_LENGTH = 200  # SequenceGenerator's max_len_b

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
COUNTS = tuple(SAME)[:5]
DEFAULTS: dict[str, Any] = {"max_target_positions": 2048} | dict.fromkeys(tuple(SAME)[5:], 0.0)
LIMITS = (Limit("no_token_positional_embeddings", off, "TrOCR and Blenderbot always add positions"),)
FLAGS = ("decoder_learned_pos", "decoder_normalize_before", "share_decoder_input_output_embed")
READ = frozenset({*SAME, *FLAGS, *(limit.field for limit in LIMITS), "apply_mask", "normalize"})
# `final_dropout` acts between the encoder and the decoder, where transformers has none
TRAINING_ONLY = frozenset({"final_dropout", "reset_dict", "seq2seq_path"})


def describe_seq2seq(
    checkpoint: Checkpoint, request: Request, *, name: str, families: Mapping[tuple[str, str], Family]
) -> Model:
    """Decide everything about the conversion of a sequence-to-sequence model.

    Args:
        checkpoint, request: as for `convert.model.architectures.describe`.
        name: fairseq's name of the architecture.
        families: as for `convert.model.encoder.describe_encoder`.

    Raises:
        PlanError: every problem of settings, vocabulary, names and shapes at once.
    """
    reader = encoder_settings(checkpoint)
    family = family_of(checkpoint, reader, families)
    outer, task = (
        Reader(dict(values), dict.fromkeys(values, section), reader.problems)
        for section, values in (("model", checkpoint.settings["model"]), ("task", checkpoint.settings["task"]))
    )
    head = request.head or KIND
    if head not in (KIND, "encoder"):
        raise PlanError(f"a {KIND} checkpoint has no {head} head", code="no-head", key=head, hint="--head encoder")
    sources = Sources(checkpoint, request, name, KIND, head, reader, outer, task)
    fields = replace(family.fields, training_only=(family.fields.training_only | TRAINING_ONLY) - READ)
    training_only = classify(sources, Kind(KIND, nested=True, read=READ), fields)
    sources.dictionary = read_dictionary(sources, "decoder.embed_tokens.weight")
    config = encoder_config(sources, family.fields) + family.values(sources)
    decoder = _decoder(sources)
    bare = head == "encoder"
    if bare:
        processor = make_processor(None, {}, task, sources.problems)
    else:
        processor = _processor(sources)
        config = [replace(value, name=f"encoder.{value.name}") for value in config]
        config.append(Value("encoder.model_type", family.model_type, "the class"))
        config += [replace(value, name=f"decoder.{value.name}") for value in decoder]
        config += _both(sources)
    complete = not any(problem.code in ("missing-setting", "bad-setting") for problem in sources.problems)
    proved = prove(sources, _layout(sources, family) if complete else None)
    target = family.classes["encoder"] if bare else CLASS
    model_type = family.model_type if bare else "speech-encoder-decoder"
    sidecars = family.sidecars(sources)
    return finish(sources, proved, target, model_type, config, training_only, processor, sidecars)


def _decoder(sources: Sources) -> list[Value]:
    """The values of the decoder's part of `config.json`."""
    outer = sources.outer
    values = []
    for name, target in SAME.items():
        default = DEFAULTS.get(name, MISSING)
        value: Any = outer.count(name, default) if name in COUNTS else outer.get(name, float, default)
        values.append(Value(target, value, outer.origin(name)))
    for limit in LIMITS:
        if not limit.neutral(outer.values.get(limit.field)):
            sources.refuse("unsupported-setting", limit.field, f"is {outer.values[limit.field]!r}: {limit.why}")
    width, heads = outer.get("decoder_embed_dim", int), outer.get("decoder_attention_heads", int)
    if heads > 0 and width % heads:
        sources.refuse("bad-setting", "decoder_attention_heads", f"{heads} does not divide {width}")
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
    values = [Value("is_encoder_decoder", True, "the class"), *_ids()]
    return [*values, Value("tie_word_embeddings", False, "the encoder and the decoder share nothing")]


def _ids() -> list[Value]:
    ids = {"bos_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    return [
        Value(name, value, "fairseq's Dictionary; SequenceGenerator starts with </s>") for name, value in ids.items()
    ]


def _processor(sources: Sources) -> Processor:
    made = make_sequence_processor(sources.dictionary, sources.task, sources.problems)
    longest = min(MAX_LENGTH, sources.outer.get("max_target_positions", int, DEFAULTS["max_target_positions"]) - 1)
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


def _layout(sources: Sources, family: Family) -> Layout | None:
    """State the geometry from the settings."""
    outer, encoder = sources.outer, encoder_layout(sources, family)
    width, blocks = outer.get("decoder_embed_dim", int), outer.get("decoder_layers", int)
    if blocks > len(sources.checkpoint.tensors):  # or the table would be as long as it says
        detail = f"{blocks} layers of a checkpoint with {len(sources.checkpoint.tensors)} tensors"
        sources.refuse("bad-setting", "decoder_layers", detail)
        return None
    return encoder and Layout(
        family=KIND,
        kind=KIND,
        encoder=encoder,
        projection=width != encoder.hidden,
        width=width,
        ffn=outer.get("decoder_ffn_embed_dim", int),
        blocks=blocks,
        positions=outer.get("max_target_positions", int, DEFAULTS["max_target_positions"]),
        learned=outer.get("decoder_learned_pos", bool, False),
        pre_norm=outer.get("decoder_normalize_before", bool, False),
        shared=outer.get("share_decoder_input_output_embed", bool, False),
        vocab=len(sources.dictionary or ()),
    )
