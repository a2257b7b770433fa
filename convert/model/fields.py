"""What every setting of fairseq's encoders means: a value of Hugging Face's configuration, training only, or a limit.

Sources: `fairseq.models.wav2vec.wav2vec2.Wav2Vec2Config`, `wav2vec2_asr.Wav2Vec2CtcConfig`, and
`transformers.Wav2Vec2Config`. A setting that stands in none of a family's lists is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

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

# setting -> field of transformers' configurations with the same meaning and value: of every encoder, and of the quantizer
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
QUANTIZER = {
    "dropout_features":        "feat_quantizer_dropout",
    "latent_vars":             "num_codevectors_per_group",
    "latent_groups":           "num_codevector_groups",
    "num_negatives":           "num_negatives",
    "logit_temp":              "contrastive_logits_temperature",
}
# fmt: on

# What fairseq's dataclass says where a checkpoint is silent. Only of what acts in training, or shows in the shapes;
# layers, widths, heads, norm placement, activation and convolutions have no default.
DEFAULTS: dict[str, Any] = {
    "activation_dropout": 0.0,
    "attention_dropout": 0.1,
    "dropout": 0.1,
    "dropout_features": 0.0,
    "dropout_input": 0.0,
    "encoder_layerdrop": 0.0,
    "latent_groups": 2,
    "latent_vars": 320,
    "logit_temp": 0.1,
    "mask_channel_length": 10,
    "mask_channel_prob": 0.0,
    "mask_length": 10,
    "mask_prob": 0.65,
    "num_negatives": 100,
}

# Settings that count something, and so are whole numbers above zero.
COUNTS = {
    *("conv_pos", "conv_pos_groups", "encoder_attention_heads", "encoder_embed_dim", "encoder_ffn_embed_dim"),
    *("encoder_layers", "latent_groups", "latent_vars", "mask_channel_length", "mask_length", "num_negatives"),
}

FLAGS = {"conv_bias", "layer_norm_first"}  # those that are true or false; all others are numbers

# setting -> (field, its words)
CHOICES: dict[str, tuple[str, Mapping[str, str]]] = {
    "activation_fn": ("hidden_act", ACTIVATIONS),
    "extractor_mode": ("feat_extract_norm", {"default": "group", "layer_norm": "layer"}),
}

# Settings of the fine-tuned model that replace the pretrained model's (wav2vec2_asr.Wav2VecEncoder, arg_overrides).
FINE_TUNING = {
    "dropout": "dropout",
    "activation_dropout": "activation_dropout",
    "attention_dropout": "attention_dropout",
    "dropout_input": "dropout_input",
    "layerdrop": "encoder_layerdrop",
    "mask_length": "mask_length",
    "mask_prob": "mask_prob",
    "mask_channel_length": "mask_channel_length",
    "mask_channel_prob": "mask_channel_prob",
}

# Settings of the fine-tuned model that replace the pretrained model's unless they are None (args_replacement there).
LAYER_SETTINGS = ("layer_type", "adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx")

# Settings that are read by name.
READ = {"_name", "conv_feature_layers", "layer_type", "mask_prob", *CHOICES}
READ_QUANTIZER = {"final_dim", "latent_dim", "quantize_targets"}
READ_CTC = frozenset({"apply_mask", "blank_mode", "blank_weight", "final_dropout", "normalize"})

# Settings that act while training only, with the reason where the name does not say it.
TRAINING_ONLY = {
    *(
        "checkpoint_activations",
        "codebook_negatives",
        "cross_sample_negatives",
        "data",
        "ddp_backend",
        "decoder_layerdrop",
    ),
    *("drop_path", "feature_grad_mult", "freeze_finetune_updates", "freeze_regex", "latent_temp", "layer_decay"),
    *("load_ema", "mask_channel_before", "mask_channel_min_space", "mask_channel_other", "mask_channel_selection"),
    *("mask_dropout", "mask_min_space", "mask_other", "mask_selection", "max_positions", "min_params_to_wrap"),
    *("negatives_from_everywhere", "no_mask_channel_overlap", "no_mask_overlap", "no_pretrained_weights"),
    *("offload_activations", "require_same_masks", "tpu", "update_alibi", "w2v_path", "zero_mask", "seed"),
    *("required_seq_len_multiple",),  # pads and masks what it padded: without effect on the result
    *("quantizer_factor",),  # width of the hidden layers that quantizer_depth > 1 adds
    *("same_quantizer",),  # acts with quantize_input only, which is refused
    *("fp16", "attn_type", "depthwise_conv_kernel_size", "pos_enc_type"),  # conformer layers only
    *("adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx"),  # adapter layers only
    *("eval_wer", "eval_wer_config", "eval_wer_tokenizer", "eval_wer_post_process", "autoregressive"),
}


@dataclass(frozen=True, slots=True)
class Limit:
    """A setting that Hugging Face's class cannot represent unless it has its neutral value.

    Args:
        field: fairseq's setting.
        neutral: says whether a value is neutral.
        why: what is missing on the other side.
        heads: the heads that the limit holds for; all, if it is empty.
        required: whether the limit holds where the setting is absent, too.
    """

    field: str
    neutral: Callable[[Any], bool]
    why: str
    heads: tuple[str, ...] = ()
    required: bool = False


def off(value: Any) -> bool:
    """Say whether a setting is switched off."""
    return not value


def at_most_one(value: Any) -> bool:
    """Say whether a number of parts is that of a model without the feature."""
    return value in (None, 0, 1)


def only(*values: Any) -> Callable[[Any], bool]:
    """Make the test whether a setting has one of these values, or none."""
    return lambda value: value is None or value in values


# fmt: off
LIMITS = (
    Limit("pos_conv_depth",       at_most_one, "Wav2Vec2Model has one positional convolution"),
    Limit("quantize_input",       off,         "Wav2Vec2Model does not quantize its input"),
    Limit("crop_seq_to_multiple", at_most_one, "Wav2Vec2Model does not crop frames"),
    Limit("conv_pos_batch_norm",  off,         "Wav2Vec2Model has weight norm on the positional convolution"),
    Limit("layer_type",           only("transformer"), "Wav2Vec2Model has transformer layers"),
    Limit("quantizer_depth",      at_most_one, "the quantizer of Wav2Vec2ForPreTraining is one projection", ("pretraining",)),
    Limit("target_glu",           off,         "Wav2Vec2ForPreTraining has no gated linear unit on its targets", ("pretraining",)),
    Limit("quantize_targets",     lambda value: value is True,
          "Wav2Vec2ForPreTraining always quantizes its targets; --head encoder leaves them out", ("pretraining",), required=True),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Fields:
    """Every setting of one family, each in its class; what stands in none is refused.

    Args:
        same: setting -> field of the configuration with the same meaning and value.
        choices: setting -> (field, its words).
        limits: what Hugging Face's class cannot represent.
        read: settings that the family's functions read by name.
        training_only: settings that act while training only, or not at all.
        defaults: what fairseq's dataclass says where a checkpoint is silent.
        counts, flags: the names in `same` that are whole numbers above zero, and true or false.
        min_masks: how many masks of time `apply_mask` asks for at least.
    """

    same: Mapping[str, str]
    choices: Mapping[str, tuple[str, Mapping[str, str]]]
    limits: tuple[Limit, ...]
    read: AbstractSet[str]
    training_only: AbstractSet[str] = frozenset(TRAINING_ONLY)
    defaults: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)
    counts: AbstractSet[str] = frozenset(COUNTS)
    flags: AbstractSet[str] = frozenset(FLAGS)
    min_masks: int = 2


WAV2VEC2 = Fields(SAME | QUANTIZER, CHOICES, LIMITS, READ | READ_QUANTIZER)

# fmt: off
ADAPTED = Fields(
    SAME | QUANTIZER,
    CHOICES,
    (
        *(limit for limit in LIMITS if limit.field != "layer_type"),
        Limit("layer_norm_first", lambda value: value is True, "transformers has adapters only where the norm comes first", required=True),
        Limit("adp_act_fn",       only("relu"),                "the adapters of transformers have a ReLU"),
    ),
    READ | READ_QUANTIZER | {"adp_num", "adp_dim", "adp_trf_idx"},
    frozenset(TRAINING_ONLY) - {"adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx"},
)
# fmt: on
