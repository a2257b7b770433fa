"""Speech-to-text transformers (`fairseq.models.speech_to_text.S2TTransformerModel`): names and settings.

`source` is fairseq's whole key, `target` that of `Speech2TextForConditionalGeneration`. Settings:
`fairseq.models.speech_to_text.s2t_transformer`, `fairseq.models.transformer.TransformerDecoderBase`; and
`transformers.Speech2TextConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert.checkpoint.dictionary import SPECIAL
from convert.checkpoint.writer import NewNamespace
from convert.errors import PlanError
from convert.families.base import Conversion, Family, Kind, Restoring, Running, Shapes, Sources
from convert.families.damages import Absent, Change, Configure, Converted, Damages, blocks, fewer, ones, pair, roll
from convert.families.encoder import anchor, check_ranks, count
from convert.families.encoder_settings import ACTIVATIONS, check_heads
from convert.families.interface import Interface
from convert.families.planning import classify, finish, prove, read_dictionary, too_many
from convert.families.settings import Limit, Settings, Value, carried, off, only
from convert.families.speech_to_text_processor import LANGUAGE, bins, make_data_processor
from convert.rules import Drop, Edit, Rename, Rule, Table

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


def table(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one model; see `convert.mapping.table`.

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
    """Read the geometry off names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-tensor`, when it is not a speech-to-text transformer; `shape`, when a tensor has other axes.

    Example:
        >>> infer({})
        Traceback (most recent call last):
        convert.errors.PlanError: this is not a speech-to-text transformer: 5 tensors that every such model has are missing
    """
    convolutions = count(shapes, r"encoder\.subsample\.conv_layers\.(\d{1,3})\.weight")
    needed = {"encoder.transformer_layers.0.fc1.weight": 2, "decoder.layers.0.fc1.weight": 2}
    needed |= {"encoder.subsample.conv_layers.0.weight": 3, "encoder.layer_norm.weight": 1}
    needed |= {"decoder.embed_tokens.weight": 2}
    others = {f"encoder.subsample.conv_layers.{index}.weight": 3 for index in range(convolutions)}
    check_ranks(shapes, "speech-to-text transformer", needed, others)
    kernels = [shapes.get(f"encoder.subsample.conv_layers.{index}.weight", (0, 0, 0)) for index in range(convolutions)]
    return Layout(
        family=NAME,
        features=kernels[0][1],
        channels=kernels[0][0],
        kernels=tuple(shape[2] for shape in kernels),
        hidden=shapes["encoder.layer_norm.weight"][0],
        ffn=shapes["encoder.transformer_layers.0.fc1.weight"][0],
        layers=count(shapes, r"encoder\.transformer_layers\.(\d{1,3})\.fc1\.weight"),
        decoder_ffn=shapes["decoder.layers.0.fc1.weight"][0],
        decoder_layers=count(shapes, r"decoder\.layers\.(\d{1,3})\.fc1\.weight"),
        vocab=shapes["decoder.embed_tokens.weight"][0],
        ctc="encoder.ctc_proj.weight" in shapes,
    )


CLASS = "Speech2TextForConditionalGeneration"
# arguments of `register_model_architecture("s2t_transformer", ...)`; a Namespace keeps the architecture's name
ARCHITECTURES = tuple(f"s2t_transformer{size}" for size in ("", "_xs", "_s", "_sp", "_m", "_mp", "_l", "_lp"))
EMBEDDINGS = "decoder.embed_tokens.weight"

# fmt: off
SAME = {
    "encoder_embed_dim":       "d_model",
    "encoder_layers":          "encoder_layers",
    "encoder_attention_heads": "encoder_attention_heads",
    "encoder_ffn_embed_dim":   "encoder_ffn_dim",
    "decoder_layers":          "decoder_layers",
    "decoder_attention_heads": "decoder_attention_heads",
    "decoder_ffn_embed_dim":   "decoder_ffn_dim",
    "decoder_layerdrop":       "decoder_layerdrop",
    "dropout":                 "dropout",
    "attention_dropout":       "attention_dropout",
    "activation_dropout":      "activation_dropout",
    "conv_channels":           "conv_channels",
    "max_source_positions":    "max_source_positions",
    "max_target_positions":    "max_target_positions",
}
LIMITS = (
    Limit("encoder_normalize_before",       only(True),  "Speech2TextEncoder normalises before each block"),
    Limit("decoder_normalize_before",       only(True),  "Speech2TextDecoder normalises before each block"),
    Limit("conv_version",                   only("s2t_transformer"), "Speech2TextEncoder has convolutions over time only"),
    Limit("decoder_learned_pos",            off,         "Speech2TextDecoder has sinusoidal positions"),
    Limit("no_token_positional_embeddings", off,         "Speech2TextDecoder always adds positions"),
    Limit("layernorm_embedding",            off,         "Speech2TextDecoder has no norm on its embeddings"),
    Limit("no_decoder_final_norm",          off,         "Speech2TextDecoder has a final norm"),
    Limit("no_cross_attention",             off,         "Speech2TextDecoder attends to the encoder in each layer"),
    Limit("cross_self_attention",           off,         "Speech2TextDecoder attends to itself and to the encoder apart"),
    Limit("adaptive_softmax_cutoff",        off,         "Speech2TextForConditionalGeneration has one projection to the vocabulary"),
    Limit("quant_noise_pq",                 off,         "fairseq's decoder then has one linear layer more, on its embeddings"),
    Limit("base_layers",                    off,         "Speech2TextDecoder has no expert layers"),
    Limit("scale_attn",                     off,         "Speech2TextDecoder has no norm after its attention"),
    Limit("scale_fc",                       off,         "Speech2TextDecoder has no norm inside its feed-forward blocks"),
    Limit("scale_heads",                    off,         "Speech2TextDecoder does not weigh its heads"),
    Limit("scale_resids",                   off,         "Speech2TextDecoder does not weigh its residuals"),
    Limit("encoder_xformers_att_config",    off,         "Speech2TextEncoder has plain attention"),
    Limit("decoder_xformers_att_config",    off,         "Speech2TextDecoder has plain attention"),
)
# fmt: on
READ = frozenset({"_name", "activation_fn", "conv_kernel_sizes", "decoder_embed_dim", "decoder_output_dim"})
READ |= {"input_channels", "input_feat_per_channel", "no_scale_embedding", "share_decoder_input_output_embed"}
TRAINING_ONLY = frozenset({"encoder_freezing_updates", "load_pretrained_encoder_from", "relu_dropout"})
TRAINING_ONLY |= {"adaptive_softmax_dropout", "ctc_weight", "ignore_prefix_size", "label_smoothing"}
TRAINING_ONLY |= {"conv_out_channels", "decoder_input_dim", "encoder_layerdrop"}  # without effect on this model
SETTINGS = Settings(
    same=SAME,
    choices={"activation_fn": ("activation_function", ACTIVATIONS)},
    limits=LIMITS,
    read=READ,
    training_only=TRAINING_ONLY,
    defaults={"decoder_layerdrop": 0.0},
    counts=frozenset(name for name in SAME if not name.endswith(("dropout", "layerdrop"))),
)
KIND = Kind(NAME, data_config=True)


def describe(sources: Sources) -> Conversion:
    """Decide everything about the conversion of a speech-to-text transformer.

    Raises:
        PlanError: every problem of settings, vocabulary, names and shapes at once.
    """
    request = sources.request
    training_only = classify(sources, SETTINGS)
    config = _config(sources)
    if request.data_config is None:
        detail = "the checkpoint carries no dictionary, and no sentencepiece model"
        hint = "pass the config.yaml of the model's data, its dictionary and its sentencepiece model beside it: "
        sources.refuse("no-data-config", "--data-config", detail, hint + "--data-config config.yaml")
    sources.dictionary = read_dictionary(sources, EMBEDDINGS)
    processor = make_data_processor(sources)
    config.append(Value("vocab_size", len(sources.dictionary or ()), "dictionary"))
    layout = None if any(p.code == "missing-setting" for p in sources.problems) else _layout(sources)
    made = finish(sources, prove(sources, layout), CLASS, config, training_only, processor)
    symbols = sources.dictionary.symbols if sources.dictionary else ()
    languages = [found[1] for symbol in symbols if (found := LANGUAGE.fullmatch(symbol))]
    first = processor.files["generation_config.json"].get("forced_bos_token_id")
    if first is None:
        return made
    written = LANGUAGE.sub(r"\1", symbols[first])
    several = f"{len(languages)} languages: texts are written in {written}; --lang changes it"
    return replace(made, language=request.language, notes=(several,) if len(languages) > 1 else ())


def _config(sources: Sources) -> list[Value]:
    """The values of `config.json`."""
    reader = sources.reader
    values = carried(reader, SETTINGS)
    values += [reader.choice(name, target, words) for name, (target, words) in SETTINGS.choices.items()]
    kernels, unscaled = _kernels(sources), reader.get("no_scale_embedding", bool, False)
    tied = reader.get("share_decoder_input_output_embed", bool, False)
    values += [
        Value("conv_kernel_sizes", kernels, reader.origin("conv_kernel_sizes")),
        Value("num_conv_layers", len(kernels), reader.origin("conv_kernel_sizes")),
        Value("input_feat_per_channel", bins(sources), reader.origin("input_feat_per_channel")),
        Value("input_channels", 1, reader.origin("input_channels")),
        Value("scale_embedding", not unscaled, reader.origin("no_scale_embedding")),
        Value("tie_word_embeddings", tied, reader.origin("share_decoder_input_output_embed")),
        Value("encoder_layerdrop", 0.0, "S2TTransformerEncoder drops no layer"),
        Value("is_encoder_decoder", True, "the class"),
        Value("bos_token_id", 0, "Dictionary.bos()"),
        Value("pad_token_id", 1, "Dictionary.pad()"),
        Value("eos_token_id", 2, "Dictionary.eos()"),
        Value("decoder_start_token_id", 2, "SequenceGenerator starts with Dictionary.eos()"),
    ]
    width = reader.get("encoder_embed_dim", int)
    for name in ("decoder_embed_dim", "decoder_output_dim"):
        if reader.get(name, int, width) != width:
            detail = f"is {reader.values[name]!r}, encoder_embed_dim {width}: all of Speech2TextModel has one width"
            sources.refuse("unsupported-setting", name, detail)
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        check_heads(sources, reader, name, "encoder_embed_dim")
    return values


def _kernels(sources: Sources) -> list[int]:
    text = sources.reader.get("conv_kernel_sizes", str)
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and len(number) < 4 for number in numbers) or len(numbers) > 16:
        sources.refuse("bad-setting", "conv_kernel_sizes", f"numbers between commas expected, {text[:60]!r} found")
        return []
    kernels = [int(number) for number in numbers]
    if not all(kernel % 2 for kernel in kernels):
        detail = f"is {text!r}: Conv1dSubsampler counts its frames for odd kernels only, and fails on even ones"
        sources.refuse("unsupported-setting", "conv_kernel_sizes", detail)
    return kernels


def _layout(sources: Sources) -> Layout | None:
    """State the geometry from the settings; whether there is a CTC projection only the tensors tell."""
    reader, tensors = sources.reader, sources.checkpoint.tensors
    if any(too_many(sources, reader, name) for name in ("encoder_layers", "decoder_layers")):
        return None
    kernels, embeddings = _kernels(sources), tensors.get(EMBEDDINGS)
    if not kernels:
        return None
    return Layout(
        family=NAME,
        features=bins(sources),
        channels=reader.get("conv_channels", int),
        kernels=tuple(kernels),
        hidden=reader.get("encoder_embed_dim", int),
        ffn=reader.get("encoder_ffn_embed_dim", int),
        layers=reader.get("encoder_layers", int),
        decoder_ffn=reader.get("decoder_ffn_embed_dim", int),
        decoder_layers=reader.get("decoder_layers", int),
        vocab=embeddings.shape[0] if embeddings and embeddings.shape else 0,  # read_dictionary counted them
        ctc="encoder.ctc_proj.weight" in tensors,
    )


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as fairseq wants those of a model without a dataclass: one Namespace, with the trainer's options in it."""
    model = {key: value for key, value in settings["model"].items() if key not in ("_name", "flat")}
    names = {"arch": "model", "task": "task", "criterion": "criterion"}
    named = {name: settings[section].get("_name") for name, section in names.items()}
    return {"args": NewNamespace(model | named), "cfg": None}


def _interface(sources: Sources, made: Conversion) -> Interface:
    """Windows of 25 ms every 10 ms, then convolutions that halve the frames; the beam that the checkpoint states."""
    symbols = made.dictionary.symbols if made.dictionary else ()
    generation = made.processor.files["generation_config.json"]
    return Interface(
        symbols=symbols,
        special=tuple(i for i, symbol in enumerate(symbols) if symbol in SPECIAL or LANGUAGE.fullmatch(symbol)),
        blank=-1,
        post_process="sentencepiece",
        rate=16000,
        normalize=False,
        convolutions=((400, 160), *((1, 2) for _ in _kernels(sources))),
        beam=generation.get("num_beams", 1),
        length_penalty=generation.get("length_penalty", 1.0),
    )


def _damages(model: Converted) -> Damages:
    config = model.model.config
    last, end = config.encoder_layers - 1, config.decoder_layers - 1
    attention, activation = f"model.decoder.layers.{end}.encoder_attn.", config.activation_function
    made: Damages = {
        f"q and k of the cross-attention of decoder layer {end} swapped": pair(
            f"{attention}q_proj", f"{attention}k_proj"
        ),
        "the convolutions' gates exchanged": Change(
            "model.encoder.conv.conv_layers.0.weight", lambda value: roll(value, by=len(value) // 2)
        ),
        "the embeddings moved by one symbol": Change("model.decoder.embed_tokens.weight", roll),
        "the final norm of the decoder lost": Change("model.decoder.layer_norm.weight", ones),
        "the other scale of embeddings": Configure({"scale_embedding": not config.scale_embedding}),
        "the other activation": Configure({"activation_function": "relu" if activation == "gelu" else "gelu"}),
        f"layers 0 and {last} of the encoder exchanged": blocks(model.weights, "model.encoder.layers.", last)
        if last
        else Absent("the encoder has one layer"),
    }
    for side in ("encoder", "decoder"):
        heads = getattr(config, f"{side}_attention_heads")
        wrong = fewer(heads)
        changed, absent = Configure({f"{side}_attention_heads": wrong}), f"{wrong} does not divide {config.d_model}"
        made[f"{wrong} attention heads of the {side} instead of {heads}"] = (
            Absent(absent) if config.d_model % wrong else changed
        )
    return made


def _rounds(config: Any) -> str:
    """Without fairseq's order of sums in attention, the last bits are others."""
    own = "this transformers takes no other attention than its own, which multiplies in another order"
    return own if config._attn_implementation == "eager" else ""


FAMILY = Family(
    name=NAME,
    architectures=dict.fromkeys(ARCHITECTURES, KIND),
    mark=r"^encoder\.subsample\.conv_layers\.",
    anchors=(anchor(CONVOLUTIONS[0], ENCODER[0]),),
    infer=infer,
    table=table,
    describe=describe,
    model_type=NAME,
    classes={NAME: CLASS},
    settings=SETTINGS,
    restoring=Restoring(
        settings=_arguments,
        notes=("fairseq also needs the config.yaml of the data, and beside it the files that it names",),
    ),
    paper="2010.05171",
    generates=True,
    damages=_damages,
    interface=_interface,
    running=Running(attention="fairseq", usual="eager", rounds=_rounds),
)
