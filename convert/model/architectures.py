"""From fairseq's settings to Hugging Face's class and configuration, complete or refused with all reasons."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.dictionary import Dictionary
from convert.errors import PlanError, Problem
from convert.mapping.rules import Edit, Plan, Table, plan
from convert.mapping.wav2vec2 import Layout, infer_layout, table
from convert.model.fields import (
    ACTIVATIONS,
    COUNTS,
    DEFAULTS,
    FINE_TUNING,
    LIMITS,
    READ,
    SAME,
    TRAINING_ONLY,
    TRAINING_ONLY_CTC,
)
from convert.model.processor import Processor, make_processor
from convert.model.settings import MISSING, Reader


@dataclass(frozen=True, slots=True)
class Value:
    """One value of `config.json`, and where it came from."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Model:
    """All that a conversion will do, decided before a tensor byte is read.

    Args:
        fairseq: fairseq's name of the architecture.
        target: the transformers class.
        head: `ctc`, `pretraining` or `encoder`.
        plan: the proved plan of the tensors.
        config: the values of `config.json`.
        training_only: settings without a counterpart, that act while training only.
        processor: the vocabulary and the feature extractor.
        dictionary: fairseq's target dictionary, where there is one.
    """

    fairseq: str
    target: str
    head: str
    plan: Plan
    config: tuple[Value, ...]
    training_only: Mapping[str, Any]
    processor: Processor
    dictionary: Dictionary | None


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asks for beside the checkpoint.

    Args:
        head: `ctc`, `pretraining`, `encoder`, or empty for what the checkpoint is.
        dictionary: the dictionary of `--dict`.
        base: the settings of the pretrained checkpoint, for a fine-tuned one without `w2v_args`.
        training_only: settings that the caller knows to act while training only.
    """

    head: str = ""
    dictionary: Dictionary | None = None
    base: Mapping[str, Any] | None = None
    training_only: Sequence[str] = ()


CLASSES = {"ctc": "Wav2Vec2ForCTC", "pretraining": "Wav2Vec2ForPreTraining", "encoder": "Wav2Vec2Model"}


def describe(checkpoint: Checkpoint, request: Request) -> Model:
    """Decide everything about a conversion, or refuse it with every reason.

    Args:
        checkpoint: the opened checkpoint.
        request: what the caller asks for.

    Raises:
        PlanError: every problem of settings, vocabulary, names and shapes at once.
    """
    name = str(checkpoint.settings["model"].get("_name") or _recognise(checkpoint))
    known = ARCHITECTURES.get(name)
    if known is None:
        raise PlanError(
            f"{checkpoint.path.name}: architecture {name!r} is not supported; nothing was written",
            code="unsupported-architecture",
            key=name,
            hint=f"supported: {', '.join(ARCHITECTURES)}",
        )
    return known(checkpoint, request)


def _recognise(checkpoint: Checkpoint) -> str:
    """Name the architecture of settings that do not (omegaconf dropped `_name` for a time) by its tensors."""
    if any(key.startswith("w2v_encoder.proj.") for key in checkpoint.tensors):
        return "wav2vec_ctc"
    return "wav2vec2" if "quantizer.vars" in checkpoint.tensors else "unknown"


def _wav2vec2(checkpoint: Checkpoint, request: Request) -> Model:
    return _describe(checkpoint, request, "wav2vec2", "pretraining")


def _wav2vec_ctc(checkpoint: Checkpoint, request: Request) -> Model:
    return _describe(checkpoint, request, "wav2vec_ctc", "ctc")


ARCHITECTURES: dict[str, Callable[[Checkpoint, Request], Model]] = {"wav2vec2": _wav2vec2, "wav2vec_ctc": _wav2vec_ctc}


def _describe(checkpoint: Checkpoint, request: Request, name: str, kind: str) -> Model:
    head = request.head or kind
    outer = checkpoint.settings["model"]
    reader = (
        encoder_settings(checkpoint, request) if kind == "ctc" else Reader(dict(outer), dict.fromkeys(outer, "model"))
    )
    training_only = _classify(reader, outer, kind, head, request.training_only)
    task = Reader(
        dict(checkpoint.settings["task"]), dict.fromkeys(checkpoint.settings["task"], "task"), reader.problems
    )
    dictionary = _dictionary(checkpoint, request, reader.problems) if kind == "ctc" else None
    config = _config(reader, outer, checkpoint, kind)
    layout = None if any(p.code == "missing-setting" for p in reader.problems) else _layout(reader, checkpoint, kind)
    processor = make_processor(
        dictionary if head == "ctc" else None, checkpoint.settings["criterion"], task, reader.problems
    )
    if head == "ctc":
        config += [Value(key, value, "dictionary") for key, value in processor.ids.items()]
        config.append(Value("vocab_size", len(dictionary) if dictionary else 0, "dictionary"))
    proved = _plan(checkpoint, layout, head, _edits(outer, head, reader.problems), reader.problems)
    if reader.problems or proved is None:
        raise PlanError(
            f"{checkpoint.path.name} cannot be converted completely; nothing was written",
            code="refused",
            problems=reader.problems,
            hint=_hint(reader.problems),
        )
    target = CLASSES[head]
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(_dtype(proved), "float32")
    fixed = {"architectures": [target], "model_type": "wav2vec2", "torch_dtype": dtype}
    config += [Value(key, value, "the class") for key, value in fixed.items()]
    return Model(name, target, head, proved, tuple(config), training_only, processor, dictionary)


def encoder_settings(checkpoint: Checkpoint, request: Request) -> Reader:
    """Join a fine-tuned model's settings the way `Wav2VecEncoder.__init__` does: the pretrained model's, overridden."""
    outer = checkpoint.settings["model"]
    inner = outer.get("w2v_args")
    origin = "model.w2v_args.model"
    if not isinstance(inner, dict) and request.base is not None:
        inner, origin = request.base, "the base checkpoint's model"
    if not isinstance(inner, dict):
        raise PlanError(
            f"{checkpoint.path.name} was fine-tuned, and the pretrained model's settings are not in it (w2v_args is empty)",
            code="no-base-settings",
            key="w2v_args",
            hint=f"pass the pretrained checkpoint: --base {_last(outer.get('w2v_path')) or 'PRETRAINED.pt'}",
        )
    values = dict(inner["model"])
    origins = dict.fromkeys(values, origin)
    for name, own in FINE_TUNING.items():
        if outer.get(name) is not None:
            values[own], origins[own] = outer[name], "model"
    for name in ("layer_type", "adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx"):
        if outer.get(name) is not None:
            values[name], origins[name] = outer[name], "model"
    reader = Reader(values, origins)
    ours, theirs = checkpoint.settings["task"].get("normalize"), inner["task"].get("normalize")
    if isinstance(ours, bool) and isinstance(theirs, bool) and ours != theirs:
        detail = f"the fine-tuned model has {ours}, the pretrained model {theirs}; fairseq refuses that too"
        reader.problems.append(Problem("conflict", "normalize", detail))
    return reader


def _classify(
    reader: Reader, outer: Mapping[str, Any], kind: str, head: str, asserted: Sequence[str]
) -> dict[str, Any]:
    """Put every setting into one class: carried, training only, or refused."""
    training_only = {}
    flat = bool(
        reader.values.pop("flat", False)
    )  # a Namespace holds the trainer's options too: they are not the model's
    known = {*SAME, *READ, *TRAINING_ONLY, *(limit.field for limit in LIMITS)}
    settings = {name: (value, reader.origin(name)) for name, value in reader.values.items()}
    if kind == "ctc":
        known_outer = known | {*FINE_TUNING, *TRAINING_ONLY_CTC, "flat"}
        flat_outer = bool(outer.get("flat"))
        settings |= {
            name: (value, f"model.{name}")
            for name, value in outer.items()
            if name not in reader.values and (name not in known_outer or name in TRAINING_ONLY) and not flat_outer
        }
    for name, (value, origin) in settings.items():
        if name in TRAINING_ONLY or (name in asserted and name not in known):
            training_only[name] = value
        elif name not in known and not flat and name != "w2v_args":
            if value:
                detail = f"{origin} = {str(value)[:60]!r}: no rule says what it does to the model"
                reader.problems.append(Problem("unknown-setting", name, detail))
            else:
                training_only[name] = value
    for limit in LIMITS:
        value = reader.values.get(limit.field)
        present = limit.field in reader.values
        if head in limit.heads and (present or limit.field == "quantize_targets") and not limit.neutral(value):
            reader.problems.append(Problem("unsupported-setting", limit.field, f"is {value!r}: {limit.why}"))
    return dict(sorted(training_only.items()))


def _config(reader: Reader, outer: Mapping[str, Any], checkpoint: Checkpoint, kind: str) -> list[Value]:
    values = []
    for name, target in SAME.items():
        default = DEFAULTS.get(name, MISSING)
        if name in COUNTS:
            value: Any = reader.count(name, default)
        else:
            value = reader.get(name, bool if name in ("conv_bias", "layer_norm_first") else float, default)
        values.append(Value(target, value, reader.origin(name)))
    convolutions = reader.convolutions("conv_feature_layers")
    origin = reader.origin("conv_feature_layers")
    values += [
        Value("conv_dim", [channels for channels, _, _ in convolutions], origin),
        Value("conv_kernel", [kernel for _, kernel, _ in convolutions], origin),
        Value("conv_stride", [stride for _, _, stride in convolutions], origin),
        Value("num_feat_extract_layers", len(convolutions), origin),
    ]
    values.append(_choice(reader, "activation_fn", "hidden_act", ACTIVATIONS))
    values.append(_choice(reader, "extractor_mode", "feat_extract_norm", {"default": "group", "layer_norm": "layer"}))
    hidden, final = reader.get("encoder_embed_dim", int), reader.get("final_dim", int, 0)
    codevector = reader.get("latent_dim", int, 0) or final or hidden
    values += [
        Value("codevector_dim", codevector, f"{reader.origin('latent_dim')}, else final_dim, else encoder_embed_dim"),
        Value("proj_codevector_dim", final or hidden, f"{reader.origin('final_dim')}, else encoder_embed_dim"),
        Value("feat_extract_activation", "gelu", "ConvFeatureExtractionModel always uses GELU"),
        Value("layer_norm_eps", 1e-5, "fairseq.modules.LayerNorm's default"),
        Value("mask_time_min_masks", 2, "Wav2Vec2Model.apply_mask always asks for 2"),
        Value("mask_feature_min_masks", 0, "Wav2Vec2Model.apply_mask asks for none"),
    ]
    values += _masking(reader, outer, kind)
    criterion = checkpoint.settings["criterion"]
    if kind == "ctc":
        own = Reader(dict(outer), dict.fromkeys(outer, "model"), reader.problems)
        values.append(Value("final_dropout", own.get("final_dropout", float, 0.0), own.origin("final_dropout")))
        values.append(Value("ctc_loss_reduction", "sum", "CtcCriterion sums"))
        values.append(Value("ctc_zero_infinity", criterion.get("zero_infinity") is True, "criterion.zero_infinity"))
    weights = criterion.get("loss_weights")
    if kind == "pretraining" and isinstance(weights, list) and weights and isinstance(weights[0], (int, float)):
        values.append(Value("diversity_loss_weight", float(weights[0]), "criterion.loss_weights[0]"))
    heads = reader.count("encoder_attention_heads")
    if heads > 0 and hidden % heads:
        reader.problems.append(Problem("bad-setting", "encoder_attention_heads", f"{heads} does not divide {hidden}"))
    return values


def _choice(reader: Reader, name: str, target: str, choices: Mapping[str, str]) -> Value:
    value = reader.get(name, str)
    if value and value not in choices:
        detail = f"{value!r} has no twin in transformers; known: {', '.join(choices)}"
        reader.problems.append(Problem("unsupported-setting", name, detail))
    return Value(target, choices.get(value), reader.origin(name))


def _masking(reader: Reader, outer: Mapping[str, Any], kind: str) -> list[Value]:
    """Masking in training: transformers has a mask embedding only where one of its probabilities is positive.

    `Wav2Vec2Model.__init__` leaves `masked_spec_embed` out otherwise; so that the tensor is kept, a model that never
    masks gets a positive probability together with `apply_spec_augment=False`, which switches masking off.
    """
    probability = reader.get("mask_prob", float, DEFAULTS["mask_prob"])
    channels = reader.get("mask_channel_prob", float, DEFAULTS["mask_channel_prob"])
    own = Reader(dict(outer), dict.fromkeys(outer, "model"), reader.problems)
    applied = own.get("apply_mask", bool, False) if kind == "ctc" else True
    origin = reader.origin("mask_prob")
    if probability <= 0 and channels <= 0:
        note = "no masking: switched off by apply_spec_augment, so that mask_emb has a place"
        return [Value("mask_time_prob", 0.05, note), Value("apply_spec_augment", False, origin)]
    return [
        Value("mask_time_prob", probability, origin),
        Value("apply_spec_augment", applied, "model.apply_mask" if kind == "ctc" else "pretraining always masks"),
    ]


def _layout(reader: Reader, checkpoint: Checkpoint, kind: str) -> Layout | None:
    """State the geometry from the settings; what only tensors tell (weight norm removed, rows of the head) from them."""
    try:
        seen = infer_layout(checkpoint.inventory)
    except PlanError as error:
        reader.problems += error.problems
        return None
    if seen.kind != kind:
        detail = f"the settings say {kind}, the tensors are those of a {seen.kind} model"
        reader.problems.append(Problem("conflict", "_name", detail))
        return None
    if reader.get("encoder_layers", int) > len(checkpoint.tensors):  # or the table would be as long as it says
        detail = f"{reader.get('encoder_layers', int)} layers of a checkpoint with {len(checkpoint.tensors)} tensors"
        reader.problems.append(Problem("bad-setting", "encoder_layers", detail))
        return None
    convolutions = reader.convolutions("conv_feature_layers")
    hidden, groups = reader.get("encoder_embed_dim", int), reader.get("conv_pos_groups", int)
    if not convolutions or not hidden or not groups:
        return None
    final = reader.get("final_dim", int, 0) or hidden
    codevector = reader.get("latent_dim", int, 0) or final
    count = reader.get("latent_groups", int, DEFAULTS["latent_groups"]) or 1
    return Layout(
        kind=kind,
        convolutions=tuple((channels, kernel) for channels, kernel, _ in convolutions),
        group_norm=reader.get("extractor_mode", str) == "default",
        conv_bias=reader.get("conv_bias", bool),
        projection=convolutions[-1][0] != hidden,
        weight_norm=seen.weight_norm,
        hidden=hidden,
        ffn=reader.get("encoder_ffn_embed_dim", int),
        layers=reader.get("encoder_layers", int),
        conv_pos=reader.get("conv_pos", int),
        pos_group=hidden // groups,
        vocab=seen.vocab,
        codes=reader.get("latent_vars", int, DEFAULTS["latent_vars"]) * count,
        code_width=codevector // count,
        codevector=codevector,
        final=final,
    )


def _edits(outer: Mapping[str, Any], head: str, problems: list[Problem]) -> list[Edit]:
    """`Wav2VecCtc.get_logits`: a constant on the blank's logit becomes part of the head's row 0."""
    weight, mode = outer.get("blank_weight") or 0, outer.get("blank_mode") or "add"
    if head != "ctc" or not weight:
        return []
    if mode not in ("add", "set"):
        problems.append(Problem("bad-setting", "blank_mode", f"`add` or `set` expected, {mode!r} found"))
        return []
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        problems.append(Problem("bad-setting", "blank_weight", f"a number expected, {str(weight)[:60]!r} found"))
        return []
    reason = f"blank_weight {weight} in mode {mode}"
    bias = Edit("lm_head.bias", 0, mode, float(weight), reason)
    return [bias] if mode == "add" else [Edit("lm_head.weight", 0, "set", 0.0, reason), bias]


def _dictionary(checkpoint: Checkpoint, request: Request, problems: list[Problem]) -> Dictionary | None:
    inside, given = checkpoint.dictionary, request.dictionary
    if inside and given and inside.symbols != given.symbols:
        detail = f"the checkpoint's has {len(inside)} symbols, the file's {len(given)}"
        first = next((i for i, (a, b) in enumerate(zip(inside.symbols, given.symbols, strict=False)) if a != b), None)
        detail += f"; they first differ at {first}" if first is not None else ""
        problems.append(Problem("dictionary-conflict", "--dict", detail))
    dictionary = inside or given
    rows = checkpoint.inventory.get("w2v_encoder.proj.bias")
    if dictionary is None and request.head != "encoder":
        problems.append(
            Problem("no-dictionary", "--dict", "the checkpoint carries no dictionary (before February 2021)")
        )
    elif dictionary and rows and rows.shape != (len(dictionary),):
        detail = f"has {len(dictionary)} symbols, the model's head {math.prod(rows.shape[:1])} rows"
        problems.append(Problem("dictionary-size", "dictionary", detail))
    return dictionary


def _plan(
    checkpoint: Checkpoint, layout: Layout | None, head: str, edits: list[Edit], problems: list[Problem]
) -> Plan | None:
    problems += [Problem("unmapped-source", name, "is no tensor") for name in checkpoint.others]
    if layout is None:
        return None
    made: Table
    try:
        made = table(layout, head, edits=edits)
        return plan(made, checkpoint.inventory)
    except PlanError as error:
        problems += error.problems
        return None


def _hint(problems: Sequence[Problem]) -> str:
    codes = {problem.code for problem in problems}
    if codes & {"no-dictionary", "dictionary-size", "dictionary-conflict"}:
        return "pass the dictionary the model was trained with: --dict dict.ltr.txt"
    if "unknown-setting" in codes:
        return "if a setting acts while training only, say so: --training-only NAME"
    return ""


def _dtype(proved: Plan) -> str:
    found = [spec.dtype for spec in proved.target.values()]
    return max(set(found), key=found.count)


def _last(path: Any) -> str:
    return str(path).replace("\\", "/").rpartition("/")[2] if path else ""
