"""wav2vec 2.0 with adapters in its layers (`fairseq.models.wav2vec.wav2vec2.AdapterFast`), one for each language.

Which languages a checkpoint has, which of them the weights are converted for, and the file of each. MMS files keep the
languages beside the model, in `adapter`; other models stack their adapters, see `convert.checkpoint.stacks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.stacks import STACKED, unstack
from convert.errors import PlanError, Problem
from convert.families import wav2vec2
from convert.families.base import Conversion, Language, Part, Shapes, Sidecar, Sources
from convert.families.ctc import HEAD as CTC_HEAD
from convert.families.ctc import Symbols
from convert.families.encoder import Layout, assemble, encoder_rules, infer_encoder
from convert.families.planning import choose, describe_encoder
from convert.families.settings import Limit, Reader, Value, must_be, only
from convert.families.tokenizers import Processor, is_plain, vocab
from convert.planner import Plan, plan
from convert.rules import Drop, Edit, Fill, Rename, Rule, Table, TensorSpec, Zeros, add_prefix

# fmt: off
ADAPTER = (
    Rename("encoder.layers.{adapted}.adapter_layer.ln_W", "encoder.layers.{adapted}.adapter_layer.norm.weight",     "hidden"),
    Rename("encoder.layers.{adapted}.adapter_layer.ln_b", "encoder.layers.{adapted}.adapter_layer.norm.bias",       "hidden"),
    Rename("encoder.layers.{adapted}.adapter_layer.W_a",  "encoder.layers.{adapted}.adapter_layer.linear_1.weight", "adapter hidden"),
    Rename("encoder.layers.{adapted}.adapter_layer.b_a",  "encoder.layers.{adapted}.adapter_layer.linear_1.bias",   "adapter"),
    Rename("encoder.layers.{adapted}.adapter_layer.W_b",  "encoder.layers.{adapted}.adapter_layer.linear_2.weight", "hidden adapter"),
    Rename("encoder.layers.{adapted}.adapter_layer.b_b",  "encoder.layers.{adapted}.adapter_layer.linear_2.bias",   "hidden"),
)
_NOTHING = "fairseq has no adapter in this layer (adp_trf_idx), transformers has; made of zeros it adds zero"
NO_ADAPTER = (
    Fill("encoder.layers.{bare}.adapter_layer.norm.{p}",          Zeros(), _NOTHING, "hidden"),
    Fill("encoder.layers.{bare}.adapter_layer.linear_1.weight",   Zeros(), _NOTHING, "adapter hidden"),
    Fill("encoder.layers.{bare}.adapter_layer.linear_1.bias",     Zeros(), _NOTHING, "adapter"),
    Fill("encoder.layers.{bare}.adapter_layer.linear_2.weight",   Zeros(), _NOTHING, "hidden adapter"),
    Fill("encoder.layers.{bare}.adapter_layer.linear_2.bias",     Zeros(), _NOTHING, "hidden"),
)
# fmt: on
_OTHER = "belongs to another language"
_ALONE = "--lang LANG takes one language alone"
OWN = "own_adapter.safetensors"
_NAME = re.compile(r"[\w-]{1,80}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Own(Part):
    """What only a model with adapters has.

    Args:
        width: `adp_dim`, the width inside an adapter.
        adapted: the layers that have one.
        bare: the layers that have none.
        rows: `adp_num`, the adapters that are stacked in each.
        row: the one that is taken.
    """

    width: int
    adapted: tuple[int, ...]
    bare: tuple[int, ...]
    rows: int
    row: int

    @property
    def axes(self) -> Mapping[str, Sequence[object]]:
        """The values of the axes that the adapters' rules name."""
        return {"adapted": self.adapted, "bare": self.bare}

    @property
    def dims(self) -> Mapping[str, int]:
        """The size that the adapters' rules name."""
        return {"adapter": self.width}


# fmt: off
SETTINGS = replace(
    wav2vec2.SETTINGS,
    limits=(
        *(limit for limit in wav2vec2.LIMITS if limit.field != "layer_type"),
        must_be("layer_norm_first", True,           "transformers has adapters only where the norm comes first"),
        Limit("adp_act_fn",         only("relu"),   "the adapters of transformers have a ReLU"),
    ),
    read=wav2vec2.SETTINGS.read | {"adp_num", "adp_dim", "adp_trf_idx"},
    training_only=wav2vec2.SETTINGS.training_only - {"adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx"},
)
# fmt: on


def infer(shapes: Shapes) -> Layout[Own]:
    """Read the geometry of a wav2vec 2.0 model with adapters off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-tensor`, when it is not a wav2vec 2.0 model.
    """
    shapes = unstack(shapes, lambda shape: shape, lambda shape, _: shape[1:])
    kind, prefix, encoder, head = infer_encoder(shapes, wav2vec2.KINDS)
    found = [match for key in shapes if (match := STACKED.search(key))]
    narrow = [shape[0] for key, shape in shapes.items() if ".adapter_layer.b_a[" in key and len(shape) == 1]
    adapted = {int(match[1]) for match in found}
    rows = max((int(match[3] or 0) for match in found), default=-1) + 1
    own = _own(narrow[0] if narrow else 0, adapted, encoder.layers, rows, 0)
    return Layout("wav2vec2_adapter", kind, prefix, encoder, head, own)


def _own(width: int, adapted: Iterable[int], layers: int, rows: int, row: int) -> Own:
    chosen = tuple(sorted(adapted))
    return Own(width, chosen, tuple(layer for layer in range(layers) if layer not in chosen), rows, row)


def table(layout: Layout[Own], head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one model in one language; see `convert.families.wav2vec2.table`."""
    own = layout.own
    rules = [*encoder_rules(layout.encoder), *_of_row(own.row), *NO_ADAPTER]
    for other in range(own.rows):
        if other != own.row:
            rules += [Drop(rule.source, _OTHER, rule.shape) for rule in _of_row(other)]
    return assemble(layout, head, edits, rules, wav2vec2.KINDS, base="wav2vec2")


def _language_table(layout: Layout[Own], row: int) -> Table:
    """Make the table of what belongs to one language alone: its adapters and its head, as `load_adapter` wants them."""
    rules: list[Rule] = add_prefix([*_of_row(row), *NO_ADAPTER], source=layout.prefix, target="wav2vec2.")
    return Table.build("wav2vec2 language", [*rules, *CTC_HEAD], layout.axes, layout.dims)


def _of_row(row: int) -> list[Rename]:
    return [replace(rule, source=f"{rule.source}[{row}]") for rule in ADAPTER]


def _state(sources: Sources, layout: Layout[Own]) -> Layout[Own] | None:
    reader = sources.reader
    rows, layers = reader.count("adp_num"), layout.encoder.layers
    adapted = _adapted(reader, layers)
    tensors = len(sources.checkpoint.tensors)
    if adapted is None or rows < 1:
        return None
    if rows * len(ADAPTER) * max(1, len(adapted)) > tensors:  # or the table would be as long as it says
        sources.refuse("bad-setting", "adp_num", f"{rows} adapters in each layer, of {tensors} tensors")
        return None
    names = _names(sources.checkpoint)
    if rows > 1 and sources.kind.name != "ctc":
        sources.refuse(
            "unsupported-setting", "adp_num", f"is {rows}: only models with a CTC head have several languages"
        )
    row = names.index(sources.request.language) if rows > 1 and sources.request.language in names else 0
    return replace(layout, own=_own(reader.count("adp_dim"), adapted, layers, rows, row))


def _values(sources: Sources) -> list[Value]:
    """The width of the adapters."""
    width = sources.reader.count("adp_dim")
    return [*wav2vec2.quantizer_values(sources), Value("adapter_attn_dim", width, sources.reader.origin("adp_dim"))]


def _adapted(reader: Reader, layers: int) -> tuple[int, ...] | None:
    """The layers with adapters: `all`, or what Python's range says of `start:stop:step` (`TransformerEncoder`)."""
    text = reader.get("adp_trf_idx", str, "all")
    if text == "all":
        return tuple(range(layers))
    try:
        chosen = range(*map(int, text.split(":")))
    except (TypeError, ValueError):
        detail = f"`all`, or numbers as in 0:12 or 0:24:2 expected, {text[:60]!r} found"
        reader.problems.append(Problem("bad-setting", "adp_trf_idx", detail))
        return None
    return tuple(layer for layer in range(layers) if layer in chosen)


def _names(checkpoint: Checkpoint) -> list[str]:
    """What `multi_corpus_keys` calls the adapters, by index (`AudioFinetuningTask.load_dataset`)."""
    keys = checkpoint.settings["task"].get("multi_corpus_keys")
    return [key.strip() for key in keys.split(",")] if isinstance(keys, str) else []


def languages_of(checkpoint: Checkpoint, settings: Mapping[str, Any], problems: list[Problem]) -> dict[str, Language]:
    """List the languages of a checkpoint, by name; empty where it has no adapters.

    Args:
        checkpoint: the opened checkpoint.
        settings: of its encoder, with what fine-tuning replaced.
        problems: what contradicts itself is added here.
    """
    reader = Reader(dict(settings), {})  # which reads numbers that stand there as text, too
    stacked = reader.get("adp_num", int, 0) if settings.get("layer_type") == "trf_adp" else None
    if checkpoint.groups and stacked != 1:
        detail = f"is {stacked}; a checkpoint that keeps its languages apart, in `adapter`, has one in the model"
        problems.append(Problem("conflict", "adp_num", detail))
    if checkpoint.groups:
        return {name: Language(name, name, 0, group.dictionary) for name, group in checkpoint.groups.items()}
    if stacked is None or stacked < 1:
        return {}
    names = _names(checkpoint)
    if stacked == 1:
        name = names[0] if names else ""
        return {name: Language(name, "", 0, checkpoint.dictionary)}
    if not names or len(names) > stacked or len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
        detail = (
            f"names the {stacked} adapters by index, and is {checkpoint.settings['task'].get('multi_corpus_keys')!r}"
        )
        problems.append(Problem("bad-setting", "multi_corpus_keys", detail))
    return {name: Language(name, "", row, checkpoint.dictionary) for row, name in enumerate(names)}


def describe(sources: Sources) -> Conversion:
    """Decide everything about the conversion of a model with adapters, in all languages that it has.

    Where there are several, and none is asked for, the weights are in English or the first, and a sidecar holds each.

    Raises:
        PlanError: every problem of settings, vocabularies, names and shapes at once.
    """
    if sources.kind.name != "ctc":
        return describe_encoder(sources)
    checkpoint, request = sources.checkpoint, sources.request
    problems: list[Problem] = []
    found = languages_of(checkpoint, sources.reader.values, problems)
    chosen = None if problems else choose(found, request.language, checkpoint.path.name)
    several = len(found) > 1 and not request.language
    if several and request.head == "encoder":
        problems.append(
            Problem("no-head", "--head", "the languages of a model are told apart by their heads too", _ALONE)
        )
    model = None
    view = checkpoint if chosen is None else in_language(checkpoint, chosen)
    try:
        one = replace(request, language=chosen.name if chosen else "")
        model = describe_encoder(replace(sources, checkpoint=view, request=one))
    except PlanError as error:
        if error.code != "refused":
            raise
        problems += error.reasons
    sidecars: list[Sidecar] = []
    processor = model.processor if model else None
    if several and chosen is not None:
        if checkpoint.settings["model"].get("blank_weight"):
            why = "it would be a part of every language's head"
            problems.append(Problem("unsupported-setting", "blank_weight", why, _ALONE))
        sidecars = _sidecars(checkpoint, view, found.values(), problems)
        processor = _processor(processor, found, chosen.name, problems) if processor and processor.ids else None
    if problems or model is None or processor is None or chosen is None:
        raise PlanError(
            f"{checkpoint.path.name} cannot be converted completely; nothing was written",
            code="refused",
            problems=problems,
        )
    return replace(
        model,
        processor=processor,
        sidecars=tuple(sidecars),
        language=chosen.name,
        group=chosen.group,
        dictionary=checkpoint.dictionary if several else chosen.dictionary,
        languages={one.name: one.dictionary for one in found.values() if one.dictionary} if several else {},
    )


def in_language(checkpoint: Checkpoint, language: Language) -> Checkpoint:
    """Return the checkpoint with the tensors and the dictionary of one of its languages.

    That is what fairseq's `examples/speech_recognition/new/infer.py` does: it replaces the parameters that the language has.
    """
    return replace(checkpoint, tensors=checkpoint.over(language.group), dictionary=language.dictionary)


def _sidecars(
    checkpoint: Checkpoint, view: Checkpoint, found: Iterable[Language], problems: list[Problem]
) -> list[Sidecar]:
    try:
        layout = infer({name: spec.shape for name, spec in view.inventory.items()})
    except PlanError:  # which the model's own plan says, too
        return []
    made: list[Sidecar] = []
    plans: dict[Any, Plan] = {}
    for one in found:
        inventory = checkpoint.inventory_of(one.group)
        if not one.group:
            inventory = _of_language(inventory, one.row)
        if one.dictionary is None:
            problems.append(
                Problem("no-dictionary", f"adapter[{one.name}]", "the checkpoint has no dictionary of it", _ALONE)
            )
        file = f"adapter.{one.name}.safetensors"
        made += _sidecar(file, one.group, inventory, layout, one.row, problems, plans)
    if any(one.group for one in found):
        made += _sidecar(OWN, "", _of_language(checkpoint.inventory, 0), layout, 0, problems, plans)
    return made


def _of_language(inventory: Mapping[str, TensorSpec], row: int) -> dict[str, TensorSpec]:
    """Keep what `load_adapter` replaces: the adapters of one language, and the head."""
    return {
        name: spec
        for name, spec in inventory.items()
        if (".adapter_layer." in name and name.endswith(f"[{row}]")) or name.startswith("w2v_encoder.proj.")
    }


def _sidecar(
    file: str,
    group: str,
    inventory: Mapping[str, TensorSpec],
    layout: Layout[Own],
    row: int,
    problems: list[Problem],
    plans: dict[Any, Plan],
) -> list[Sidecar]:
    """Plan the file of one language; those with equal shapes share the plan."""
    head = inventory.get("w2v_encoder.proj.bias")
    layout = replace(layout, head=Symbols(head.shape[0] if head and head.shape else 0))
    known = plans.get((layout.head, row))
    if known is not None and known.source == inventory:
        return [Sidecar(file, known, group)]
    try:
        made = plans[layout.head, row] = plan(_language_table(layout, row), inventory)
        return [Sidecar(file, made, group)]
    except PlanError as error:
        problems += [replace(one, key=f"{file}: {one.key}", hint=one.hint or _ALONE) for one in error.problems]
        return []


def _processor(made: Processor, found: Mapping[str, Language], chosen: str, problems: list[Problem]) -> Processor:
    """Give the tokenizer the vocabularies of all languages; it has one set of special symbols for all."""
    vocabularies = {one.name: vocab(one.dictionary) for one in found.values() if one.dictionary is not None}
    tokenizer = dict(made.files["tokenizer_config.json"])
    special = [tokenizer[name] for name in ("pad_token", "bos_token", "eos_token", "unk_token")]
    meant = {token: vocabularies.get(chosen, {}).get(token) for token in special}
    delimiter = tokenizer.get("word_delimiter_token")
    for one in found.values():
        ids = vocabularies.get(one.name)
        if one.dictionary is None or ids is None:
            continue
        wrong = ""
        if len(ids) < len(one.dictionary):
            wrong = "it has duplicate symbols"
        elif {token: ids.get(token) for token in special} != meant:
            wrong = f"its special symbols are not those of {chosen}"
        elif ("|" in ids) != (delimiter == "|"):
            wrong = f"it has {'a' if '|' in ids else 'no'} word delimiter, unlike {chosen}"
        elif tokenizer["tokenizer_class"] != "Wav2Vec2CTCTokenizer" or not is_plain(one.dictionary):
            wrong = (
                "only transformers' Wav2Vec2CTCTokenizer has several languages, and it cannot make text as fairseq does"
            )
        if wrong:
            problems.append(Problem("languages", f"adapter[{one.name}]", wrong, _ALONE))
    files = {**made.files, "vocab.json": vocabularies, "tokenizer_config.json": tokenizer | {"target_lang": chosen}}
    files.pop("tokenizer.json", None)
    return replace(made, files=files)


FAMILY = replace(
    wav2vec2.FAMILY,
    name="wav2vec2_adapter",
    architectures={},
    encoders=(("wav2vec2", "trf_adp"),),
    refused={},
    mark=r"^(w2v_encoder\.w2v_model\.)?encoder\.layers\.\d+\.adapter_layer\.",
    general=False,
    infer=infer,
    table=table,
    describe=describe,
    settings=SETTINGS,
    state=_state,
    values=_values,
    languages=languages_of,
    from_config=None,
)
