"""Models with adapters: which languages a checkpoint speaks, which of them the weights speak, and the files of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.dictionary import Dictionary
from convert.errors import PlanError, Problem
from convert.mapping import adapters, infer_layout, plan
from convert.mapping.rules import TensorSpec
from convert.model.encoder import Sources, describe_encoder, encoder_settings, plain_layout, quantizer_values
from convert.model.processor import Processor, is_plain, vocab
from convert.model.settings import Reader
from convert.model.types import Model, Request, Sidecar, Value

DEFAULT = "eng"  # what `Wav2Vec2ForCTC` says that a model with adapters speaks where nobody asks for another language
OWN = "own_adapter.safetensors"
_NAME = re.compile(r"[\w-]{1,80}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Language:
    """One language of a checkpoint.

    Args:
        name: as fairseq's users choose it.
        group: where its tensors are: a key of `Checkpoint.groups`, or empty for those of the model.
        row: which of the stacked adapters it is.
        dictionary: its symbols.
    """

    name: str
    group: str
    row: int
    dictionary: Dictionary | None


def adapted_layout(sources: Sources, seen: adapters.Layout, stated: Mapping[str, Any]) -> adapters.Layout | None:
    """State the geometry of wav2vec 2.0 with adapters; see `convert.model.encoder.plain_layout`."""
    reader = sources.reader
    rows, layers = reader.count("adp_num"), stated["layers"]
    adapted = _adapted(reader, layers)
    tensors = len(sources.checkpoint.tensors)
    if adapted is None or rows < 1:
        return None
    if rows * len(adapters.ADAPTER) * max(1, len(adapted)) > tensors:  # or the table would be as long as it says
        sources.refuse("bad-setting", "adp_num", f"{rows} adapters in each layer, of {tensors} tensors")
        return None
    names = _names(sources.checkpoint)
    if rows > 1 and sources.kind != "ctc":
        sources.refuse(
            "unsupported-setting", "adp_num", f"is {rows}: only models with a CTC head have several languages"
        )
    row = names.index(sources.request.language) if rows > 1 and sources.request.language in names else 0
    plain = plain_layout(sources, seen, stated)
    known = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    return adapters.Layout(**known, adapter=reader.count("adp_dim"), adapted=adapted, rows=rows, row=row)


def adapter_values(sources: Sources) -> list[Value]:
    """The width of the adapters."""
    width = sources.reader.count("adp_dim")
    return [*quantizer_values(sources), Value("adapter_attn_dim", width, sources.reader.origin("adp_dim"))]


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


def choose(found: Mapping[str, Language], wanted: str, file: str) -> Language:
    """Choose the language that the weights speak: the one that is asked for, English, or the first of the file.

    Raises:
        PlanError: `unknown-language`, with the list of those that there are.
    """
    if wanted and wanted not in found:
        known = ", ".join(sorted(found)) or "none"
        raise PlanError(
            f"{file} has no language {wanted!r}; nothing was written",
            code="unknown-language",
            key="--lang",
            hint=f"it has: {known if len(known) < 400 else known[:400] + ', ...'}",
        )
    return found.get(wanted or DEFAULT) or next(iter(found.values()))


def describe_languages(checkpoint: Checkpoint, request: Request, **how: Any) -> Model:
    """Decide everything about the conversion of a model with a CTC head, in all languages that it speaks.

    Where there are several, and none is asked for, the weights speak `DEFAULT` or the first, and a sidecar holds each.

    Args:
        checkpoint, request: as for `convert.model.architectures.describe`.
        how: what `convert.model.encoder.describe_encoder` takes beside them.

    Raises:
        PlanError: every problem of settings, vocabularies, names and shapes at once.
    """
    problems: list[Problem] = []
    found = languages_of(checkpoint, encoder_settings(checkpoint).values, problems)
    if not found and not request.language and not problems:
        return describe_encoder(checkpoint, request, **how)
    chosen = None if problems else choose(found, request.language, checkpoint.path.name)
    several = len(found) > 1 and not request.language
    if several and request.head == "encoder":
        problems.append(
            Problem("no-head", "--head", "the languages of a model are told apart by their heads too; see --lang")
        )
    model = None
    view = checkpoint if chosen is None else speaking(checkpoint, chosen)
    try:
        model = describe_encoder(view, replace(request, language=chosen.name if chosen else ""), **how)
    except PlanError as error:
        if error.code != "refused":
            raise
        problems += error.problems
    sidecars: list[Sidecar] = []
    processor = model.processor if model else None
    if several and chosen is not None:
        if checkpoint.settings["model"].get("blank_weight"):
            why = "it would be a part of every language's head; --lang takes one language alone"
            problems.append(Problem("unsupported-setting", "blank_weight", why))
        sidecars = _sidecars(checkpoint, view, found.values(), problems)
        processor = _processor(processor, found, chosen.name, problems) if processor and processor.ids else None
    if problems or model is None or processor is None:
        raise PlanError(
            f"{checkpoint.path.name} cannot be converted completely; nothing was written",
            code="refused",
            problems=problems,
            hint="" if not several else "--lang LANG takes one language alone",
        )
    assert chosen is not None
    return replace(
        model,
        processor=processor,
        sidecars=tuple(sidecars),
        language=chosen.name,
        group=chosen.group,
        dictionary=checkpoint.dictionary if several else chosen.dictionary,
        languages={one.name: one.dictionary for one in found.values() if one.dictionary} if several else {},
    )


def speaking(checkpoint: Checkpoint, language: Language) -> Checkpoint:
    """Return the checkpoint with the tensors and the dictionary of one of its languages.

    That is what fairseq's `examples/speech_recognition/new/infer.py` does: it replaces the parameters that the language has.
    """
    return replace(checkpoint, tensors=checkpoint.over(language.group), dictionary=language.dictionary)


def _sidecars(
    checkpoint: Checkpoint, view: Checkpoint, found: Iterable[Language], problems: list[Problem]
) -> list[Sidecar]:
    try:
        layout = infer_layout(view.inventory, adapters.FAMILY.name)
    except PlanError:  # which the model's own plan says, too
        return []
    made = []
    for one in found:
        inventory = checkpoint.inventory_of(one.group)
        if not one.group:
            inventory = _own(inventory, one.row)
        if one.dictionary is None:
            problems.append(Problem("no-dictionary", f"adapter[{one.name}]", "the checkpoint has no dictionary of it"))
        file = f"adapter.{one.name}.safetensors"
        made += _sidecar(file, one.group, inventory, layout, one.row, problems)
    if any(one.group for one in found):
        made += _sidecar(OWN, "", _own(checkpoint.inventory, 0), layout, 0, problems)
    return made


def _own(inventory: Mapping[str, TensorSpec], row: int) -> dict[str, TensorSpec]:
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
    layout: adapters.Layout,
    row: int,
    problems: list[Problem],
) -> list[Sidecar]:
    head = inventory.get("w2v_encoder.proj.bias")
    layout = replace(layout, vocab=head.shape[0] if head and head.shape else 0)
    try:
        return [Sidecar(file, plan(adapters.language_table(layout, row), inventory), group)]
    except PlanError as error:
        problems += [Problem(one.code, f"{file}: {one.key}", one.detail) for one in error.problems]
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
            wrong = "symbols stand there twice"
        elif {token: ids.get(token) for token in special} != meant:
            wrong = f"its special symbols are not those of {chosen}"
        elif ("|" in ids) != (delimiter == "|"):
            wrong = f"it has {'a' if '|' in ids else 'no'} word delimiter, unlike {chosen}"
        elif tokenizer["tokenizer_class"] != "Wav2Vec2CTCTokenizer" or not is_plain(one.dictionary):
            wrong = (
                "only transformers' Wav2Vec2CTCTokenizer has several languages, and it cannot make text as fairseq does"
            )
        if wrong:
            problems.append(Problem("languages", f"adapter[{one.name}]", wrong))
    files = {**made.files, "vocab.json": vocabularies, "tokenizer_config.json": tokenizer | {"target_lang": chosen}}
    files.pop("tokenizer.json", None)
    return replace(made, files=files)
