"""What the settings of fairseq's encoders mean, as far as all families share it.

Sources: `fairseq.models.wav2vec.wav2vec2.Wav2Vec2Config`, `wav2vec2_asr.Wav2Vec2CtcConfig`, and
`transformers.Wav2Vec2Config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.checkpoint import Checkpoint
from convert.errors import PlanError, Problem
from convert.families.base import Sources
from convert.families.settings import Reader, Value, carried
from convert.report import quoted

# fairseq.utils.get_activation_fn -> transformers.activations.ACT2FN
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "linear": "linear",
    "relu": "relu",
    "swish": "swish",
    "tanh": "tanh",
}

# setting -> field of transformers' configurations with the same meaning and value
# fmt: off
SAME = {
    "encoder_embed_dim":       "hidden_size",
    "encoder_layers":          "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim":   "intermediate_size",
    "conv_bias":               "conv_bias",
    "conv_pos":                "num_conv_pos_embeddings",
    "conv_pos_groups":         "num_conv_pos_embedding_groups",
    "layer_norm_first":        "do_stable_layer_norm",
    "dropout":                 "hidden_dropout",
    "attention_dropout":       "attention_dropout",
    "activation_dropout":      "activation_dropout",
    "dropout_input":           "feat_proj_dropout",
    "encoder_layerdrop":       "layerdrop",
    "mask_length":             "mask_time_length",
    "mask_channel_prob":       "mask_feature_prob",
    "mask_channel_length":     "mask_feature_length",
}
# fmt: on

# What fairseq's dataclass says where a checkpoint is silent. Only of what acts in training, or shows in the shapes;
# layers, widths, heads, norm placement, activation and convolutions have no default.
DEFAULTS: dict[str, Any] = {
    "activation_dropout": 0.0,
    "attention_dropout": 0.1,
    "dropout": 0.1,
    "dropout_input": 0.0,
    "encoder_layerdrop": 0.0,
    "mask_channel_length": 10,
    "mask_channel_prob": 0.0,
    "mask_length": 10,
    "mask_prob": 0.65,
}

# Settings that count something, and so are whole numbers above zero.
COUNTS = frozenset({"conv_pos", "conv_pos_groups", "encoder_attention_heads", "encoder_embed_dim"})
COUNTS |= {"encoder_ffn_embed_dim", "encoder_layers", "mask_channel_length", "mask_length"}

FLAGS = frozenset({"conv_bias", "layer_norm_first"})  # those that are true or false; all others are numbers

# setting -> (field, its words)
CHOICES: dict[str, tuple[str, Mapping[str, str]]] = {
    "activation_fn": ("hidden_act", ACTIVATIONS),
    "extractor_mode": ("feat_extract_norm", {"default": "group", "layer_norm": "layer"}),
}

# What transformers' configurations take where config.json is silent, as far as it shows in outputs or shapes, or stands in a
# setting; widths, layers, heads and convolutions have to be stated.
ABSENT: dict[str, Any] = {
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "codevector_dim": 256,
    "contrastive_logits_temperature": 0.1,
    "conv_bias": False,
    "do_stable_layer_norm": False,
    "feat_extract_activation": "gelu",
    "feat_extract_norm": "group",
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "layer_norm_eps": 1e-5,
    "layerdrop": 0.1,
    "mask_feature_length": 10,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "mask_time_prob": 0.05,
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 320,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "num_negatives": 100,
    "proj_codevector_dim": 256,
}

# Settings of the fine-tuned model that replace the pretrained model's (wav2vec2_asr.Wav2VecEncoder, arg_overrides).
FINE_TUNING = {
    "layerdrop": "encoder_layerdrop",
    "dropout": "dropout",
    "activation_dropout": "activation_dropout",
    "attention_dropout": "attention_dropout",
    "dropout_input": "dropout_input",
    "mask_length": "mask_length",
    "mask_prob": "mask_prob",
    "mask_channel_length": "mask_channel_length",
    "mask_channel_prob": "mask_channel_prob",
}

# Settings of the fine-tuned model that replace the pretrained model's unless they are None (args_replacement there).
LAYER_SETTINGS = ("layer_type", "adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx")

# Settings that are read by name.
READ = frozenset({"_name", "conv_feature_layers", "layer_type", "mask_prob", *CHOICES})

# Settings that act while training only, with the reason where the name does not say it.
TRAINING_ONLY = frozenset(
    {
        *("checkpoint_activations", "codebook_negatives", "cross_sample_negatives", "data", "ddp_backend"),
        *(
            "decoder_layerdrop",
            "drop_path",
            "feature_grad_mult",
            "freeze_finetune_updates",
            "freeze_regex",
            "latent_temp",
            "layer_decay",
        ),
        *("load_ema", "mask_channel_before", "mask_channel_min_space", "mask_channel_other", "mask_channel_selection"),
        *("mask_dropout", "mask_min_space", "mask_other", "mask_selection", "max_positions", "min_params_to_wrap"),
        *("negatives_from_everywhere", "no_mask_channel_overlap", "no_mask_overlap", "no_pretrained_weights"),
        *("offload_activations", "require_same_masks", "tpu", "update_alibi", "w2v_path", "zero_mask", "seed"),
        *("required_seq_len_multiple",),  # pads and masks what it padded: without effect on the result
        *("quantizer_factor",),  # width of the hidden layers that quantizer_depth > 1 adds
        *("same_quantizer",),  # acts with quantize_input only, which is refused
        *("fp16", "attn_type", "depthwise_conv_kernel_size", "pos_enc_type"),  # of other types of layers
        *("adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx"),  # of layers with adapters
        *("eval_wer", "eval_wer_config", "eval_wer_tokenizer", "eval_wer_post_process", "autoregressive"),
    }
)


def origin_of(checkpoint: Checkpoint, section: str = "model") -> str:
    """Say where settings stand: in a section of the checkpoint's own, or of those of the one that was passed with --base."""
    return section if checkpoint.base is None or not checkpoint.base.whole else f"the base checkpoint's {section}"


def encoder_settings(checkpoint: Checkpoint) -> Reader:
    """Join a fine-tuned model's settings the way `Wav2VecEncoder.__init__` does: the pretrained model's, overridden."""
    outer = checkpoint.settings["model"]
    inner = outer.get("w2v_args")
    origin = "model.w2v_args.model" if checkpoint.base is None else "the base checkpoint's model"
    if not isinstance(inner, dict):
        raise PlanError(
            f"{checkpoint.path.name} was fine-tuned, and the pretrained model's settings are not in it (w2v_args is empty)",
            code="no-base-settings",
            key="w2v_args",
            hint=f"pass the pretrained checkpoint: --base {quoted(_pretrained(outer.get('w2v_path')))}",
        )
    values = dict(inner["model"])
    origins = dict.fromkeys(values, origin)
    for name, own in FINE_TUNING.items():
        if outer.get(name) is not None:
            values[own], origins[own] = outer[name], "model"
    for name in LAYER_SETTINGS:
        if outer.get(name) is not None:
            values[name], origins[name] = outer[name], "model"
    reader = Reader(values, origins)
    ours, theirs = checkpoint.settings["task"].get("normalize"), inner["task"].get("normalize")
    if isinstance(ours, bool) and isinstance(theirs, bool) and ours != theirs:
        detail = f"the fine-tuned model has {ours}, the pretrained model {theirs}; fairseq refuses that too"
        reader.problems.append(Problem("conflict", "normalize", detail))
    return reader


def encoder_config(sources: Sources) -> list[Value]:
    """Translate the settings of an encoder into values of its `config.json`."""
    reader, fields = sources.reader, sources.family.settings
    values = carried(reader, fields)
    convolutions = reader.convolutions("conv_feature_layers")
    origin = reader.origin("conv_feature_layers")
    values += [
        Value("conv_dim", [channels for channels, _, _ in convolutions], origin),
        Value("conv_kernel", [kernel for _, kernel, _ in convolutions], origin),
        Value("conv_stride", [stride for _, _, stride in convolutions], origin),
        Value("num_feat_extract_layers", len(convolutions), origin),
    ]
    for name, (target, choices) in fields.choices.items():
        values.append(reader.choice(name, target, choices))
    values += [
        Value("feat_extract_activation", "gelu", "ConvFeatureExtractionModel always uses GELU"),
        Value("layer_norm_eps", 1e-5, "fairseq.modules.LayerNorm's default"),
        Value("mask_time_min_masks", fields.min_masks, f"apply_mask always asks for {fields.min_masks}"),
        Value("mask_feature_min_masks", 0, "apply_mask asks for none"),
    ]
    values += _masking(sources)
    check_heads(sources, reader, "encoder_attention_heads", "encoder_embed_dim")
    return values


def check_heads(sources: Sources, reader: Reader, heads: str, width: str) -> None:
    """Refuse a number of attention heads that does not divide the width."""
    number, whole = reader.get(heads, int), reader.get(width, int)
    if number > 0 and whole % number:
        sources.refuse("bad-setting", heads, f"{number} does not divide {whole}")


def _masking(sources: Sources) -> list[Value]:
    """Masking in training: transformers has a mask embedding only where one of its probabilities is positive.

    `Wav2Vec2Model.__init__` leaves `masked_spec_embed` out otherwise; so that the tensor is kept, a model that never
    masks gets a positive probability together with `apply_spec_augment=False`, which switches masking off.
    """
    reader, pretraining = sources.reader, sources.kind.name == "pretraining"
    probability = reader.get("mask_prob", float, DEFAULTS["mask_prob"])
    channels = reader.get("mask_channel_prob", float, DEFAULTS["mask_channel_prob"])
    applied = pretraining or sources.outer.get("apply_mask", bool, False)
    origin = reader.origin("mask_prob")
    if probability <= 0 and channels <= 0:
        note = "no masking: switched off by apply_spec_augment, so that mask_emb has a place"
        return [Value("mask_time_prob", 0.05, note), Value("apply_spec_augment", False, origin)]
    return [
        Value("mask_time_prob", probability, origin),
        Value("apply_spec_augment", applied, "pretraining always masks" if pretraining else "model.apply_mask"),
    ]


def _pretrained(path: object) -> str:
    """Name the file that a model was fine-tuned from, unless all that fairseq's trainer writes are called so."""
    name = str(path or "").replace("\\", "/").rpartition("/")[2]
    return name if name and not name.startswith("checkpoint") else "PRETRAINED.pt"
