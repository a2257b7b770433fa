"""From an opened checkpoint to a conversion: settings, dictionary, geometry and plan, complete or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from convert.checkpoint.dictionary import Dictionary
from convert.errors import PlanError
from convert.families.base import KEPT_HEAD, Conversion, Language, Part, Sidecar, Sources
from convert.families.encoder import PREFIXES, Encoder, Layout
from convert.families.encoder_settings import FINE_TUNING, encoder_config
from convert.families.settings import Reader, Settings, Value, refuse_limited
from convert.families.tokenizers import Processor, make_processor
from convert.pieces import not_repeated
from convert.planner import Plan, plan
from convert.rules import Edit, Table, TensorSpec

DEFAULT = "eng"  # the language of a `Wav2Vec2ForCTC` with adapters, where nobody asks for another
_MADE = 16_000_000  # bytes that rules may make for a small file


def describe_encoder(sources: Sources) -> Conversion:
    """Decide everything about the conversion of a model that consists of an encoder and perhaps a head.

    Raises:
        PlanError: every problem of settings, vocabulary, names and shapes at once.
    """
    family, kind, head = sources.family, sources.kind, sources.head
    training_only = classify(sources, family.settings)
    if kind.symbols:
        sources.dictionary = read_dictionary(sources, kind.symbols)
    config = encoder_values(sources)
    layout = None if any(p.code == "missing-setting" for p in sources.problems) else encoder_layout(sources)
    processor = make_processor(
        sources.dictionary if head != "encoder" and kind.text else None,
        sources.criterion,
        sources.task,
        sources.problems,
        sources.request.post_process,
    )
    if head == "ctc":
        config += [Value(key, value, "dictionary") for key, value in processor.ids.items()]
        config.append(Value("vocab_size", len(sources.dictionary or ()), "dictionary"))
    proved = prove(sources, layout, kind.edits(sources) if head != "encoder" else [])
    sidecars = family.sidecars(sources)
    return finish(sources, proved, family.classes.get(head, ""), config, training_only, processor, sidecars)


def encoder_values(sources: Sources) -> list[Value]:
    """Translate the settings of an encoder with its head into values of `config.json`."""
    return encoder_config(sources) + sources.family.values(sources) + sources.kind.values(sources)


def finish(
    sources: Sources,
    proved: Plan | None,
    target: str,
    config: Sequence[Value],
    training_only: Mapping[str, Any],
    processor: Processor,
    sidecars: Sequence[Sidecar] = (),
    model_type: str = "",
) -> Conversion:
    """Put together what was decided, unless there is a reason to refuse.

    Args:
        sources: what it was decided from, with the problems.
        proved: the plan; `None` where there is none, for reasons among the problems.
        target: the transformers class.
        config: the values of `config.json` so far.
        training_only, processor, sidecars: as in `Conversion`.
        model_type: what `config.json` calls it, where that is not what the family is called.

    Raises:
        PlanError: every problem at once.
    """
    if sources.request.keep_final_proj and all(sidecar.file != KEPT_HEAD for sidecar in sidecars):
        sources.refuse("no-head", "--keep-final-proj", "no pretraining head is left out that could be kept")
    if sources.problems or proved is None:
        raise PlanError(
            f"{sources.checkpoint.path.name} cannot be converted completely; nothing was written",
            code="refused",
            problems=sources.problems,
        )
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(_dtype(proved), "float32")
    fixed = {"architectures": [target], "model_type": model_type or sources.family.model_type, "torch_dtype": dtype}
    values = (*config, *(Value(key, value, "the class") for key, value in fixed.items()))
    return Conversion(
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


def classify(sources: Sources, fields: Settings) -> dict[str, Any]:
    """Put every setting into one class: carried, training only, or refused."""
    reader, outer = sources.reader, sources.outer.values
    training_only = {}
    flat = bool(
        reader.values.pop("flat", False)
    )  # a Namespace holds the trainer's options too: they are not the model's
    known = {*fields.same, *fields.read, *fields.training_only, *(limit.field for limit in fields.limits)}
    absent = [name for name in sources.request.training_only if name not in reader.values and name not in outer]
    if absent:
        detail = f"the checkpoint has no setting called {' or '.join(absent)}"
        hint = "`inspect --json` lists its settings: check the name, or leave it out"
        sources.refuse("no-setting", "--training-only", detail, hint)
    settings = {name: (value, reader.origin(name)) for name, value in reader.values.items()}
    if sources.kind.nested:
        known_outer = known | {*FINE_TUNING, *sources.kind.read, "w2v_args", "flat"}
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
                hint = "if a setting acts while training only, say so: --training-only NAME"
                sources.refuse("unknown-setting", name, detail, hint)
            else:
                training_only[name] = value
    refuse_limited(reader.values, fields.limits, sources.problems, sources.head)
    return dict(sorted(training_only.items()))


def encoder_layout(sources: Sources) -> Layout[Any] | None:
    """State the geometry from the settings; what only tensors tell (weight norm removed, rows of the head) from them."""
    shapes = {name: spec.shape for name, spec in sources.checkpoint.inventory.items()}
    try:
        seen: Layout[Any] = sources.family.infer(shapes)
    except PlanError as error:
        sources.problems.extend(error.reasons)
        return None
    stated = sources.kind.name if sources.kind.name in PREFIXES else ""
    if (
        seen.kind != stated and seen.prefix == PREFIXES[stated]
    ):  # a head that is not there, or another one: the plan names it
        seen = replace(seen, kind=stated, head=sources.kind.measure(shapes))
    if seen.kind != stated:
        found = f"a {seen.kind} model" if seen.kind else "a model with a decoder"
        sources.refuse("conflict", "_name", f"the settings say {sources.kind.name}, the tensors are those of {found}")
        return None
    return stated_layout(sources, seen.head, seen.own, seen.encoder.weight_norm)


def stated_layout(sources: Sources, head: Part, own: Part, weight_norm: bool = True) -> Layout[Any] | None:
    """State the geometry from the settings alone.

    Args:
        sources: where the settings are.
        head, own: what tensors tell of the head and of what only the family has.
        weight_norm: whether the positional convolution has its weight norm.
    """
    reader, kind = sources.reader, sources.kind.name
    if too_many(sources, reader, "encoder_layers"):
        return None
    convolutions = reader.convolutions("conv_feature_layers")
    hidden, groups = reader.get("encoder_embed_dim", int), reader.get("conv_pos_groups", int)
    if not convolutions or not hidden or not groups:
        return None
    encoder = Encoder(
        convolutions=tuple((channels, kernel) for channels, kernel, _ in convolutions),
        group_norm=reader.get("extractor_mode", str) == "default",
        conv_bias=reader.get("conv_bias", bool),
        projection=convolutions[-1][0] != hidden,
        weight_norm=weight_norm,
        hidden=hidden,
        ffn=reader.get("encoder_ffn_embed_dim", int),
        layers=reader.get("encoder_layers", int),
        conv_pos=reader.get("conv_pos", int),
        pos_group=hidden // groups,
    )
    stated = kind if kind in PREFIXES else ""
    head = sources.kind.state(sources, head)
    made: Layout[Any] | None = sources.family.state(
        sources, Layout(sources.family.name, stated, PREFIXES[stated], encoder, head, own)
    )
    return made


def too_many(sources: Sources, reader: Reader, name: str) -> bool:
    """Refuse more layers than there are tensors: the table would be as long as the settings say."""
    layers: int = reader.get(name, int)
    tensors = len(sources.checkpoint.tensors)
    if layers > tensors:
        sources.refuse("bad-setting", name, f"{layers} layers of a checkpoint with {tensors} tensors")
    return layers > tensors


def kept_head(sources: Sources, table_of: Callable[[Any, Iterable[str]], Table]) -> list[Sidecar]:
    """Keep a pretraining head that transformers has no class for in a file of its own, where that is asked for.

    Args:
        sources: where the checkpoint and the request are.
        table_of: makes that file's table of (layout, fairseq's keys).
    """
    inventory = sources.checkpoint.inventory
    if not sources.request.keep_final_proj:
        return []
    try:
        shapes = {name: spec.shape for name, spec in inventory.items()}
        head = table_of(sources.family.infer(shapes), inventory)
        kept = plan(head, {key: inventory[key] for key in head.renames})
    except PlanError:  # the plan of the model itself says what is wrong
        return []
    return [Sidecar(KEPT_HEAD, kept)] if kept.renames else []


def read_dictionary(sources: Sources, rows_of: str) -> Dictionary | None:
    """Choose the target dictionary: the checkpoint's own, or the one that was given; both must be the same.

    Args:
        sources: where they are.
        rows_of: the tensor that has one row for each symbol.
    """
    inside, given = sources.checkpoint.dictionary, sources.request.dictionary
    hint = "" if sources.kind.data_config else "pass the dictionary the model was trained with: --dict dict.ltr.txt"
    given = given.labels if given and not sources.kind.text else given
    if inside and given and inside.symbols != given.symbols:
        detail = f"the checkpoint's has {len(inside)} symbols, the file's {len(given)}"
        first = next((i for i, (a, b) in enumerate(zip(inside.symbols, given.symbols, strict=False)) if a != b), None)
        detail += f"; they first differ at {first}" if first is not None else ""
        sources.refuse("dictionary-conflict", "--dict", detail, hint)
    dictionary = inside or given
    rows = sources.checkpoint.inventory.get(rows_of)
    if dictionary is None and sources.head != "encoder":
        sources.refuse("no-dictionary", "--dict", "the checkpoint carries no dictionary", hint)
    elif dictionary and rows and rows.shape[:1] != (len(dictionary),):
        detail = f"has {len(dictionary)} symbols, the model's head {math.prod(rows.shape[:1])} rows"
        sources.refuse("dictionary-size", "dictionary", detail, hint)
    return dictionary


def prove(
    sources: Sources,
    layout: Any,
    edits: Iterable[Edit] = (),
    table: Callable[[Any, str, Iterable[Edit]], Table] | None = None,
) -> Plan | None:
    """Make the table of a geometry, and prove the plan of the tensors; `None` where there is none, the reasons noted."""
    checkpoint = sources.checkpoint
    made, inventory = None, checkpoint.inventory
    try:
        made = None if layout is None else (table or sources.family.table)(layout, sources.head, edits)
        for name in checkpoint.others:
            if made is None or name not in made.drops:
                sources.refuse("unexpected-tensor", name, "is not a tensor")
            else:
                inventory[name] = TensorSpec(name, ())
        proved = None if made is None or _too_much(sources, made) else plan(made, inventory)
    except PlanError as error:
        reasons = error.reasons
        codes = {problem.code for problem in (*sources.problems, *reasons)}
        if layout is not None and codes <= {"missing-tensor", "unexpected-tensor"}:
            if codes == {"missing-tensor"} and _without_head(layout, inventory, table or sources.family.table):
                hint = "everything but the head is there: --head encoder converts the model without it"
            elif checkpoint.base is not None:
                hint = f"{checkpoint.base.name} is of another architecture: name one of the same with --base"
            elif codes == {"unexpected-tensor"}:
                hint = "tensors that a fork added need rules of their own: docs/adding_a_family.md"
            else:
                hint = "tensors and settings are not of the same model: convert the file as its trainer wrote it"
            reasons = tuple(replace(problem, hint=hint) for problem in reasons)
        sources.problems.extend(reasons)
        return None
    if proved is not None:
        sources.problems.extend(not_repeated(checkpoint.container, proved, checkpoint.tensors))
    return proved


def _without_head(layout: Any, inventory: Mapping[str, TensorSpec], table: Callable[..., Table]) -> bool:
    """Say whether all tensors have a place once the head is left out."""
    try:
        plan(table(layout, "encoder", ()), inventory)
    except PlanError:
        return False
    return True


def choose(found: Mapping[str, Language], wanted: str, file: str) -> Language:
    """Choose the language of the weights: the one that is asked for, English, or the first of the file.

    Raises:
        PlanError: `unknown-language`, with the list of those that there are.
    """
    if wanted and wanted not in found:
        raise unknown_language(file, wanted, found)
    return found.get(wanted or DEFAULT) or next(iter(found.values()))


def unknown_language(file: str, wanted: str, known: Iterable[str]) -> PlanError:
    """Refuse a language that a checkpoint does not have, with the list of those that it has."""
    message = f"{file} has no language {wanted!r}; nothing was written"
    return PlanError(message, code="unknown-language", key="--lang", hint=list_languages(known))


def list_languages(known: Iterable[str]) -> str:
    """Write the remedy of a language that a model does not have: the list of those that it has."""
    listed = ", ".join(sorted(known))
    if not listed:
        return "leave --lang out: this model has one language"
    return f"it has: {listed if len(listed) < 400 else listed[:400] + ', ...'}"


def _too_much(sources: Sources, made: Table) -> bool:
    """Refuse a table that makes more numbers than there are in the file: only its settings say how many."""
    needs = {key: 4 * math.prod(made.shapes[key]) for key in made.fills}
    if sum(needs.values()) <= sources.checkpoint.size + _MADE:
        return False
    largest = max(needs, key=lambda key: needs[key])
    detail = f"the settings ask for {made.shapes[largest]} numbers that the file does not hold"
    sources.refuse("size-bomb", largest, detail)
    return True


def _dtype(proved: Plan) -> str:
    found = [spec.dtype for spec in proved.target.values()]
    return max(set(found), key=found.count)
