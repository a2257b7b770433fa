"""From the settings of wav2vec 2.0, and of what is built like it, to a class and a configuration: complete, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.dictionary import Dictionary
from convert.errors import PlanError, Problem
from convert.mapping import infer_layout, plan, table
from convert.mapping.rules import Edit, Plan, Table, TensorSpec
from convert.mapping.wav2vec2 import Layout
from convert.model.fields import DEFAULTS, FINE_TUNING, LAYER_SETTINGS, Fields
from convert.model.processor import Processor, make_processor
from convert.model.settings import MISSING, Reader
from convert.model.types import KEPT_HEAD, Model, Request, Sidecar, Value
from convert.transfer import not_repeated, product

_MADE = 16_000_000  # bytes that rules may make for a small file


@dataclass(slots=True)
class Sources:
    """What a conversion is decided from.

    Args:
        checkpoint: the opened checkpoint.
        request: what the caller asks for.
        name: fairseq's name of the architecture.
        kind: the kind of checkpoint, such as `ctc`.
        head: the head that is converted, `encoder` for none.
        reader: the settings of the encoder, with what fine-tuning replaced.
        outer: the settings of the model as they stand; those of the encoder too, unless it was fine-tuned.
        task: the settings of the task.
        dictionary: the target dictionary, once it was read.
    """

    checkpoint: Checkpoint
    request: Request
    name: str
    kind: str
    head: str
    reader: Reader
    outer: Reader
    task: Reader
    dictionary: Dictionary | None = None

    @property
    def criterion(self) -> Mapping[str, Any]:
        """The settings of the criterion."""
        found: Mapping[str, Any] = self.checkpoint.settings["criterion"]
        return found

    @property
    def problems(self) -> list[Problem]:
        """What was found wrong so far; one list for all readers."""
        return self.reader.problems

    def refuse(self, code: str, key: str, detail: str) -> None:
        """Add a reason to refuse the conversion."""
        self.problems.append(Problem(code, key, detail))


def _nothing(sources: Sources) -> list[Any]:
    return []


@dataclass(frozen=True, slots=True)
class Family:
    """What the settings of one family of encoders mean.

    Args:
        name: the family's name in `convert.mapping`.
        model_type: what `config.json` calls it.
        classes: head -> transformers class; a kind of checkpoint that is not in it loses its head.
        fields: the settings, each in its class.
        layout: the geometry by (settings, what the shapes say, the same in all families); see `plain_layout`.
        values: the values of `config.json` that only this family has.
        sidecars: the files of tensors that its classes have no place for.
    """

    name: str
    model_type: str
    classes: Mapping[str, str]
    fields: Fields
    layout: Callable[[Sources, Any, Mapping[str, Any]], Any]
    values: Callable[[Sources], list[Value]] = _nothing
    sidecars: Callable[[Sources], list[Sidecar]] = _nothing


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of checkpoint adds to its encoder.

    Args:
        name: such as `ctc`.
        nested: whether the encoder's settings are in `w2v_args`.
        read: settings of the model, beside those of the encoder, that are read by name.
        symbols: the tensor with one row for each symbol of the dictionary; empty without one.
        values: the values of `config.json` that only this kind has.
        edits: changes of single rows of its head.
        text: whether the symbols spell text; otherwise they are labels, and none of them is special.
    """

    name: str
    nested: bool
    read: frozenset[str] = frozenset()
    symbols: str = ""
    values: Callable[[Sources], list[Value]] = _nothing
    edits: Callable[[Sources], list[Edit]] = _nothing
    text: bool = True


def describe_encoder(
    checkpoint: Checkpoint,
    request: Request,
    *,
    name: str,
    kind: Kind,
    families: Mapping[tuple[str, str], Family],
) -> Model:
    """Decide everything about the conversion of a model that consists of an encoder and perhaps a head.

    Args:
        checkpoint, request: as for `convert.model.architectures.describe`.
        name: fairseq's name of the architecture.
        kind: what the checkpoint adds to its encoder.
        families: (fairseq's name of the encoder, its `layer_type`) -> family.

    Raises:
        PlanError: every problem of settings, vocabulary, names and shapes at once.
    """
    model = checkpoint.settings["model"]
    reader = (
        encoder_settings(checkpoint)
        if kind.nested
        else Reader(dict(model), dict.fromkeys(model, origin_of(checkpoint)))
    )
    family = family_of(checkpoint, reader, families)
    head = request.head or (kind.name if kind.name in family.classes else "encoder")
    outer, task = (
        Reader(dict(values), dict.fromkeys(values, section), reader.problems)
        for section, values in (("model", model), ("task", checkpoint.settings["task"]))
    )
    sources = Sources(checkpoint, request, name, kind.name, head, reader, outer, task)
    training_only = classify(sources, kind, family.fields)
    if kind.symbols:
        sources.dictionary = read_dictionary(sources, kind.symbols, text=kind.text)
    config = encoder_config(sources, family.fields) + family.values(sources) + kind.values(sources)
    layout = None if any(p.code == "missing-setting" for p in sources.problems) else encoder_layout(sources, family)
    processor = make_processor(
        sources.dictionary if head != "encoder" and kind.text else None, sources.criterion, task, sources.problems
    )
    if head == "ctc":
        config += [Value(key, value, "dictionary") for key, value in processor.ids.items()]
        config.append(Value("vocab_size", len(sources.dictionary or ()), "dictionary"))
    proved = prove(sources, layout, kind.edits(sources) if head != "encoder" else [])
    sidecars = family.sidecars(sources)
    target = family.classes.get(head, "")
    return finish(sources, proved, target, family.model_type, config, training_only, processor, sidecars)


def finish(
    sources: Sources,
    proved: Plan | None,
    target: str,
    model_type: str,
    config: Sequence[Value],
    training_only: Mapping[str, Any],
    processor: Processor,
    sidecars: Sequence[Sidecar] = (),
) -> Model:
    """Put together what was decided, unless there is a reason to refuse.

    Args:
        sources: what it was decided from, with the problems.
        proved: the plan; `None` where there is none, for reasons among the problems.
        target: the transformers class.
        model_type: what `config.json` calls it.
        config: the values of `config.json` so far.
        training_only, processor, sidecars: as in `Model`.

    Raises:
        PlanError: every problem at once.
    """
    if sources.request.keep_final_proj and all(sidecar.file != KEPT_HEAD for sidecar in sidecars):
        sources.refuse(
            "no-head", "--keep-final-proj", "there is no pretraining head that would be left out and can be kept"
        )
    if sources.problems or proved is None:
        raise PlanError(
            f"{sources.checkpoint.path.name} cannot be converted completely; nothing was written",
            code="refused",
            problems=sources.problems,
            hint=_hint(sources.problems),
        )
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(_dtype(proved), "float32")
    fixed = {"architectures": [target], "model_type": model_type, "torch_dtype": dtype}
    values = (*config, *(Value(key, value, "the class") for key, value in fixed.items()))
    return Model(
        fairseq=sources.name,
        target=target,
        head=sources.head,
        plan=proved,
        config=values,
        training_only=training_only,
        processor=processor,
        dictionary=sources.dictionary,
        sidecars=tuple(sidecars),
    )


def family_of(checkpoint: Checkpoint, reader: Reader, families: Mapping[tuple[str, str], Family]) -> Family:
    """Choose the family by what the encoder's settings say; where omegaconf dropped the name, by its tensors."""
    name = str(reader.values.get("_name") or "")
    if not name:
        name = "hubert" if any(key.endswith("label_embs_concat") for key in checkpoint.tensors) else "wav2vec2"
    layer = str(reader.values.get("layer_type") or "transformer")
    found = families.get((name, layer)) or families.get((name, "transformer"))  # whose limits name the layer type
    if found is None:
        raise unsupported(checkpoint.path.name, name, dict.fromkeys(name for name, _ in families))
    return found


# fairseq's name of an architecture -> why it is not supported, where there is more to say than that
_NO_CODE = "neither fairseq nor s3prl holds its model's code, so that nothing could prove a conversion"
REASONS = {
    "av_hubert": "AV-HuBERT, which sees video too, and for which transformers has no class",
    "contentvec": "ContentVec with the layers that hear the speaker; its `legacy` file is a plain HuBERT, which converts",
    "data2vec_multi": "data2vec 2.0, for which transformers has no class",
    "multires_hubert": "HuBERT at several frame rates, for which transformers has no class",
    "unispeech": _NO_CODE,
    "unispeech_sat": _NO_CODE,
}


def unsupported(file: str, name: str, known: Iterable[str]) -> PlanError:
    """Refuse an architecture by its name, with the list of those that are supported."""
    reason = f" ({REASONS[name]})" if name in REASONS else ""
    return PlanError(
        f"{file}: architecture {name!r} is not supported{reason}; nothing was written",
        code="unsupported-architecture",
        key=name,
        hint=f"supported: {', '.join(known)}",
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
            hint=f"pass the pretrained checkpoint: --base {_last(outer.get('w2v_path')) or 'PRETRAINED.pt'}",
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


def classify(sources: Sources, kind: Kind, fields: Fields) -> dict[str, Any]:
    """Put every setting into one class: carried, training only, or refused."""
    reader, outer = sources.reader, sources.outer.values
    training_only = {}
    flat = bool(
        reader.values.pop("flat", False)
    )  # a Namespace holds the trainer's options too: they are not the model's
    known = {*fields.same, *fields.read, *fields.training_only, *(limit.field for limit in fields.limits)}
    settings = {name: (value, reader.origin(name)) for name, value in reader.values.items()}
    if kind.nested:
        known_outer = known | {*FINE_TUNING, *kind.read, "w2v_args", "flat"}
        flat_outer = bool(outer.get("flat"))
        settings |= {
            name: (value, f"model.{name}")
            for name, value in outer.items()
            if name not in reader.values
            and (name not in known_outer or name in fields.training_only)
            and not flat_outer
        }
    for name, (value, origin) in settings.items():
        if name in fields.training_only or (name in sources.request.training_only and name not in known):
            training_only[name] = value
        elif name not in known and not flat and name != "w2v_args":
            if value:
                detail = f"{origin} = {str(value)[:60]!r}: no rule says what it does to the model"
                sources.refuse("unknown-setting", name, detail)
            else:
                training_only[name] = value
    for limit in fields.limits:
        value = reader.values.get(limit.field)
        present = limit.field in reader.values or limit.required
        if (not limit.heads or sources.head in limit.heads) and present and not limit.neutral(value):
            sources.refuse("unsupported-setting", limit.field, f"is {value!r}: {limit.why}")
    return dict(sorted(training_only.items()))


def encoder_config(sources: Sources, fields: Fields) -> list[Value]:
    """Translate the settings of an encoder into values of its `config.json`."""
    reader = sources.reader
    values = []
    for name, target in fields.same.items():
        default = fields.defaults.get(name, MISSING)
        if name in fields.counts:
            value: Any = reader.count(name, default)
        else:
            value = reader.get(name, bool if name in fields.flags else float, default)
        values.append(Value(target, value, reader.origin(name)))
    convolutions = reader.convolutions("conv_feature_layers")
    origin = reader.origin("conv_feature_layers")
    values += [
        Value("conv_dim", [channels for channels, _, _ in convolutions], origin),
        Value("conv_kernel", [kernel for _, kernel, _ in convolutions], origin),
        Value("conv_stride", [stride for _, _, stride in convolutions], origin),
        Value("num_feat_extract_layers", len(convolutions), origin),
    ]
    for name, (target, choices) in fields.choices.items():
        values.append(choice(reader, name, target, choices))
    values += [
        Value("feat_extract_activation", "gelu", "ConvFeatureExtractionModel always uses GELU"),
        Value("layer_norm_eps", 1e-5, "fairseq.modules.LayerNorm's default"),
        Value("mask_time_min_masks", fields.min_masks, f"apply_mask always asks for {fields.min_masks}"),
        Value("mask_feature_min_masks", 0, "apply_mask asks for none"),
    ]
    values += _masking(sources, fields)
    hidden, heads = reader.get("encoder_embed_dim", int), reader.count("encoder_attention_heads")
    if heads > 0 and hidden % heads:
        sources.refuse("bad-setting", "encoder_attention_heads", f"{heads} does not divide {hidden}")
    return values


def quantizer_values(sources: Sources) -> list[Value]:
    """The widths of the quantizer, and what its loss weighs: wav2vec 2.0's pretraining head."""
    reader = sources.reader
    hidden, final = reader.get("encoder_embed_dim", int), reader.get("final_dim", int, 0)
    codevector = reader.get("latent_dim", int, 0) or final or hidden
    values = [
        Value("codevector_dim", codevector, f"{reader.origin('latent_dim')}, else final_dim, else encoder_embed_dim"),
        Value("proj_codevector_dim", final or hidden, f"{reader.origin('final_dim')}, else encoder_embed_dim"),
    ]
    weights = sources.criterion.get("loss_weights")
    if isinstance(weights, str):  # argparse kept the text of the list, until 2020
        weights = [part for part in weights.strip("[]() ").split(",") if part.strip()]
    if sources.kind == "pretraining" and isinstance(weights, list) and weights:
        first = Reader({"loss_weights": weights[0]}, {"loss_weights": "criterion"}, sources.problems)
        weight = first.get("loss_weights", float)
        values.append(Value("diversity_loss_weight", weight, "criterion.loss_weights[0]"))
    return values


def ctc_values(sources: Sources) -> list[Value]:
    """What CTC fine-tuning adds: the dropout before the head, and the loss."""
    outer = sources.outer
    return [
        Value("final_dropout", outer.get("final_dropout", float, 0.0), outer.origin("final_dropout")),
        Value("ctc_loss_reduction", "sum", "CtcCriterion sums"),
        Value("ctc_zero_infinity", sources.criterion.get("zero_infinity") is True, "criterion.zero_infinity"),
    ]


def choice(reader: Reader, name: str, target: str, choices: Mapping[str, str]) -> Value:
    """Translate a setting that is one of a few words; another word is refused."""
    value = reader.get(name, str)
    if value and value not in choices:
        detail = f"{value!r} has no twin in transformers; known: {', '.join(choices)}"
        reader.problems.append(Problem("unsupported-setting", name, detail))
    return Value(target, choices.get(value), reader.origin(name))


def _masking(sources: Sources, fields: Fields) -> list[Value]:
    """Masking in training: transformers has a mask embedding only where one of its probabilities is positive.

    `Wav2Vec2Model.__init__` leaves `masked_spec_embed` out otherwise; so that the tensor is kept, a model that never
    masks gets a positive probability together with `apply_spec_augment=False`, which switches masking off.
    """
    reader, pretraining = sources.reader, sources.kind == "pretraining"
    probability = reader.get("mask_prob", float, fields.defaults["mask_prob"])
    channels = reader.get("mask_channel_prob", float, fields.defaults["mask_channel_prob"])
    applied = pretraining or sources.outer.get("apply_mask", bool, False)
    origin = reader.origin("mask_prob")
    if probability <= 0 and channels <= 0:
        note = "no masking: switched off by apply_spec_augment, so that mask_emb has a place"
        return [Value("mask_time_prob", 0.05, note), Value("apply_spec_augment", False, origin)]
    return [
        Value("mask_time_prob", probability, origin),
        Value("apply_spec_augment", applied, "pretraining always masks" if pretraining else "model.apply_mask"),
    ]


def encoder_layout(sources: Sources, family: Family) -> Any:
    """State the geometry from the settings; what only tensors tell (weight norm removed, rows of the head) from them."""
    reader, checkpoint = sources.reader, sources.checkpoint
    try:
        seen = infer_layout(checkpoint.inventory, family.name)
    except PlanError as error:
        sources.problems.extend(error.problems)
        return None
    if seen.kind != sources.kind:
        sources.refuse(
            "conflict", "_name", f"the settings say {sources.kind}, the tensors are those of a {seen.kind} model"
        )
        return None
    if reader.get("encoder_layers", int) > len(checkpoint.tensors):  # or the table would be as long as it says
        detail = f"{reader.get('encoder_layers', int)} layers of a checkpoint with {len(checkpoint.tensors)} tensors"
        sources.refuse("bad-setting", "encoder_layers", detail)
        return None
    convolutions = reader.convolutions("conv_feature_layers")
    hidden, groups = reader.get("encoder_embed_dim", int), reader.get("conv_pos_groups", int)
    if not convolutions or not hidden or not groups:
        return None
    stated = {
        "family": family.name,
        "kind": sources.kind,
        "convolutions": tuple((channels, kernel) for channels, kernel, _ in convolutions),
        "group_norm": reader.get("extractor_mode", str) == "default",
        "conv_bias": reader.get("conv_bias", bool),
        "projection": convolutions[-1][0] != hidden,
        "weight_norm": seen.weight_norm,
        "hidden": hidden,
        "ffn": reader.get("encoder_ffn_embed_dim", int),
        "layers": reader.get("encoder_layers", int),
        "conv_pos": reader.get("conv_pos", int),
        "pos_group": hidden // groups,
        "vocab": seen.vocab,
        "latent": seen.latent,
    }
    return family.layout(sources, seen, stated)


def plain_layout(sources: Sources, seen: Layout, stated: Mapping[str, Any]) -> Layout:
    """State the geometry of wav2vec 2.0.

    Args:
        sources: where the settings are.
        seen: what the tensors' shapes say.
        stated: what the settings say of every family's encoder.
    """
    reader = sources.reader
    final = reader.get("final_dim", int, 0) or stated["hidden"]
    codevector = reader.get("latent_dim", int, 0) or final
    count = reader.get("latent_groups", int, DEFAULTS["latent_groups"]) or 1
    codes = reader.get("latent_vars", int, DEFAULTS["latent_vars"]) * count
    return Layout(**stated, codes=codes, code_width=codevector // count, codevector=codevector, final=final)


def kept_head(sources: Sources, family: str, table_of: Callable[[Any, Iterable[str]], Table]) -> list[Sidecar]:
    """Keep a pretraining head that transformers has no class for in a file of its own, where that is asked for.

    Args:
        sources: where the checkpoint and the request are.
        family: the family's name in `convert.mapping`.
        table_of: makes that file's table of (layout, fairseq's keys).
    """
    inventory = sources.checkpoint.inventory
    if not sources.request.keep_final_proj:
        return []
    try:
        head = table_of(infer_layout(inventory, family), inventory)
        kept = plan(head, {key: inventory[key] for key in head.renames})
    except PlanError:  # the plan of the model itself says what is wrong
        return []
    return [Sidecar(KEPT_HEAD, kept)] if kept.renames else []


def blank_edits(sources: Sources) -> list[Edit]:
    """`Wav2VecCtc.get_logits`: a constant on the blank's logit becomes part of the head's row 0."""
    outer = sources.outer.values
    weight, mode = outer.get("blank_weight") or 0, outer.get("blank_mode") or "add"
    if not weight:
        return []
    if mode not in ("add", "set"):
        sources.refuse("bad-setting", "blank_mode", f"`add` or `set` expected, {mode!r} found")
        return []
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        sources.refuse("bad-setting", "blank_weight", f"a number expected, {str(weight)[:60]!r} found")
        return []
    reason = f"blank_weight {weight} in mode {mode}"
    bias = Edit("lm_head.bias", 0, mode, float(weight), reason)
    return [bias] if mode == "add" else [Edit("lm_head.weight", 0, "set", 0.0, reason), bias]


def read_dictionary(sources: Sources, rows_of: str, *, text: bool = True) -> Dictionary | None:
    """Choose the target dictionary: the checkpoint's own, or the one that was given; both must be the same.

    Args:
        sources: where they are.
        rows_of: the tensor that has one row for each symbol.
        text: as for `Kind`.
    """
    inside, given = sources.checkpoint.dictionary, sources.request.dictionary
    given = given.labels if given and not text else given
    if inside and given and inside.symbols != given.symbols:
        detail = f"the checkpoint's has {len(inside)} symbols, the file's {len(given)}"
        first = next((i for i, (a, b) in enumerate(zip(inside.symbols, given.symbols, strict=False)) if a != b), None)
        detail += f"; they first differ at {first}" if first is not None else ""
        sources.refuse("dictionary-conflict", "--dict", detail)
    dictionary = inside or given
    rows = sources.checkpoint.inventory.get(rows_of)
    if dictionary is None and sources.head != "encoder":
        sources.refuse("no-dictionary", "--dict", "the checkpoint carries no dictionary (before February 2021)")
    elif dictionary and rows and rows.shape[:1] != (len(dictionary),):
        detail = f"has {len(dictionary)} symbols, the model's head {math.prod(rows.shape[:1])} rows"
        sources.refuse("dictionary-size", "dictionary", detail)
    return dictionary


def prove(sources: Sources, layout: Any, edits: Iterable[Edit] = ()) -> Plan | None:
    """Make the table of a geometry, and prove the plan of the tensors; `None` where there is none, the reasons noted."""
    checkpoint = sources.checkpoint
    made, inventory = None, checkpoint.inventory
    try:
        made = None if layout is None else table(layout, sources.head, edits)
        for name in checkpoint.others:
            if made is None or name not in made.drops:
                sources.refuse("unmapped-source", name, "is no tensor")
            else:
                inventory[name] = TensorSpec(name, ())
        proved = None if made is None or _too_much(sources, made) else plan(made, inventory)
    except PlanError as error:
        sources.problems.extend(error.problems)
        return None
    if proved is not None:
        sources.problems.extend(not_repeated(checkpoint.container, proved, checkpoint.tensors))
    return proved


def _too_much(sources: Sources, made: Table) -> bool:
    """Refuse a table that makes more numbers than there are in the file: only its settings say how many."""
    needs = {key: 4 * product(made.shapes[key]) for key in made.fills}
    if sum(needs.values()) <= sources.checkpoint.size + _MADE:
        return False
    largest = max(needs, key=lambda key: needs[key])
    detail = f"the settings ask for {made.shapes[largest]} numbers that the file does not hold"
    sources.refuse("size-bomb", largest, detail)
    return True


def _hint(problems: Sequence[Problem]) -> str:
    codes = {problem.code for problem in problems}
    if "no-data-config" in codes:
        return "pass the config.yaml of the model's data, its dictionary and its sentencepiece model beside it: --data-config config.yaml"
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
