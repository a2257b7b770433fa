"""The way back from directories that transformers itself saved, whose settings are those of `config.json`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from convert.checkpoint import Checkpoint
from convert.checkpoint.dictionary import SPECIAL, Dictionary
from convert.checkpoint.layouts import open_container
from convert.checkpoint.writer import NewTensor
from convert.directory import ModelDirectory
from convert.draft import Draft, loadable, stored
from convert.errors import PlanError, Problem
from convert.families import ARCHITECTURES, FAMILIES, Family, Request, sources_of
from convert.families.base import Part, Sources
from convert.families.inverse import differing, settings_from
from convert.families.planning import classify, encoder_values, stated_layout
from convert.families.settings import Reader
from convert.files import WIDTHS
from convert.rules import Table

# What a model in transformers may still call the positional convolution's weight norm (before torch 2.1).
_ALIASES = {"conv.weight_g": "conv.parametrizations.weight.original0"}
_ALIASES["conv.weight_v"] = "conv.parametrizations.weight.original1"
_MASK = "masked_spec_embed"  # which transformers leaves out without masking
_NEVER = -1e4  # the bias of symbols that fairseq's dictionary must have and the model never learned


def from_config(directory: ModelDirectory) -> Draft:
    """Decide what a directory that transformers saved becomes, or refuse it.

    Args:
        directory: with settings in `config.json` and the vocabulary in `vocab.json`.

    Raises:
        PlanError: the model has no fairseq counterpart; every reason is in `problems`.
    """
    family, head = _of_class(directory)
    kind = family.kinds["pretraining" if head == "encoder" else head]
    name = next(name for name, (_, known) in ARCHITECTURES.items() if known is kind)
    config = Reader(dict(directory.config), dict.fromkeys(directory.config, "config.json"))
    settings = settings_from(config, family, kind, head, name, _sound(directory, config.problems))
    notes = ["settings come from config.json"]
    names = {_alias(name): name for name in directory.tensors}
    with _opened(directory, settings) as opened:
        sources, _ = sources_of(opened, Request(head=head))
        _check(sources, config, notes)
        seen = {rule.source: directory.tensors[rule.target].spec.shape for rule in kind.rules if rule.target in names}
        layout = None if config.problems else stated_layout(sources, kind.measure(seen), Part())
    if layout is None:
        raise PlanError(
            f"{directory.path} has no fairseq counterpart; nothing was written",
            code="unsupported",
            problems=config.problems or sources.problems,
        )
    made = _table(family, layout, head, directory, names)
    owner = ARCHITECTURES[name][0]
    draft = Draft({}, (owner.restoring.settings or loadable)(settings), None, notes, restoring=owner.restoring)
    _fill(draft, directory, names, made)
    if head == "encoder":
        beside = Table.build("beside", owner.restoring.made, layout.axes, layout.dims)
        for key, shape in beside.shapes.items():
            _zeros(draft, key, shape, beside.fills[key].reason)
        draft.dictionaries = (None,) if kind.label_list else ()
    draft.dictionary = sources.dictionary
    if head == "ctc":
        _vocabulary(directory, config.values, draft)
    draft.teacher = owner.restoring.taught(draft.tensors, settings["model"])
    draft.notes += owner.restoring.notes if draft.teacher else ()
    return draft


def _of_class(directory: ModelDirectory) -> tuple[Family, str]:
    """Find the family and the head of a class of transformers.

    Raises:
        PlanError: there is no way back from it.
    """
    ways = [family for family in FAMILIES.values() if family.from_config]
    known = {
        name: (family, head)
        for family in ways
        for head, name in family.classes.items()
        if head == "encoder" or (head in family.kinds and family.kinds[head].from_config)
    }
    config, name = directory.config, directory.architecture
    if name not in known or config.get("model_type") != known[name][0].model_type:
        found = f"{config.get('model_type')}, {config.get('architectures')}"
        detail = f"{', '.join(sorted(known))} expected, {found} found"
        raise PlanError(
            f"{directory.path} has no fairseq counterpart; nothing was written",
            code="unsupported",
            problems=[Problem("unsupported-architecture", "architectures", detail)],
        )
    return known[name]


def _sound(directory: ModelDirectory, problems: list[Problem]) -> dict[str, Any]:
    """What the feature extractor says of waveforms, in the words of fairseq's tasks."""
    features: Any = {}
    if (directory.path / "preprocessor_config.json").is_file():
        features = directory.json("preprocessor_config.json")
    elif (directory.path / "processor_config.json").is_file():
        features = directory.json("processor_config.json").get("feature_extractor", {})
    if not isinstance(features, dict) or not isinstance(features.get("do_normalize"), bool):
        raise PlanError(
            f"{directory.path} does not say whether its input is normalised (no preprocessor_config.json)",
            code="missing-setting",
            key="do_normalize",
            hint="save the model's feature extractor beside it",
        )
    rate = Reader(features, {}, problems).count("sampling_rate", 16000)
    return {"normalize": features["do_normalize"], "sample_rate": rate}


@contextlib.contextmanager
def _opened(directory: ModelDirectory, settings: dict[str, Any]) -> Iterator[Checkpoint]:
    """Open the weights as if they were a checkpoint's; its names are still those of transformers."""
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(contextlib.closing(open_container(directory.path / name)))
            for name in directory.weight_files()
        ]
        tensors = {name: tensor for file in files for name, tensor in file.value.items()}
        yield Checkpoint(directory.path, files[0], "cfg", settings, None, tensors, (), {})


def _check(sources: Sources, config: Reader, notes: list[str]) -> None:
    """Translate the settings forward again, and refuse what does not come back."""
    if sources.kind.symbols and not sources.kind.text:
        labels = config.get("id2label", dict)
        symbols = tuple(str(labels.get(str(index))) for index in range(len(labels)))
        sources.dictionary = Dictionary(symbols, (1,) * len(symbols), ())
    fields = sources.family.settings
    classify(sources, fields)
    problems, training = differing(config, fields, encoder_values(sources))
    config.problems.extend(problems)
    if not config.problems:  # or what follows from them
        names = {**fields.same} | {name: target for name, (target, _) in fields.choices.items()}
        config.problems.extend(replace(one, key=names.get(one.key, one.key)) for one in sources.problems)
    if training:
        notes.append(f"fairseq has no such setting, which acts while training only: {', '.join(training)}")


def _alias(name: str) -> str:
    return next((name.removesuffix(old) + new for old, new in _ALIASES.items() if name.endswith(old)), name)


def _table(family: Family, layout: Any, head: str, directory: ModelDirectory, names: Mapping[str, str]) -> Table:
    """Make the table of a transformers model, and hold it against the tensors that are there."""
    made = family.table(layout, "encoder" if head == "encoder" else "", ())
    problems = [
        Problem("missing-tensor", key, "is not in the model")
        for key in made.shapes
        if key not in names and not key.endswith(_MASK)
    ]
    problems += [
        Problem("unexpected-tensor", key, "has no place in fairseq's model") for key in names.keys() - made.shapes
    ]
    for key, shape in made.shapes.items():
        if key in names and directory.tensors[names[key]].spec.shape != shape:
            found = directory.tensors[names[key]].spec.shape
            problems.append(Problem("shape", key, f"the model has {found}, config.json says {shape}"))
    for key in made.fills:  # equal widths: fairseq has no projection, so that the model's must do nothing
        if key in names and not _does_nothing(directory, names[key]):
            problems.append(
                Problem("projection", key, "fairseq has no projection between equal widths; this one is used")
            )
    if problems:
        raise PlanError(f"{directory.path} does not fit fairseq's model", code="incomplete", problems=problems)
    return made


def _fill(draft: Draft, directory: ModelDirectory, names: Mapping[str, str], made: Table) -> None:
    for source, target in made.renames.items():
        if target in names:
            draft.tensors[source] = stored(directory, directory.tensors[names[target]])
        else:
            _zeros(draft, source, made.shapes[target], "the model never masks")
    for source, drop in made.drops.items():
        if drop.repeats:
            draft.tensors[source] = replace(draft.tensors[drop.repeats])


def _zeros(draft: Draft, key: str, shape: tuple[int, ...], why: str) -> None:
    draft.tensors[key] = NewTensor("F32", shape, lambda: [bytes(4 * math.prod(shape))])
    draft.notes.append(f"{key}: zeros, {why}")


def _does_nothing(directory: ModelDirectory, name: str) -> bool:
    import numpy as np

    spec = directory.tensors[name].spec
    if spec.dtype != "F32":
        return False
    value = np.frombuffer(directory.read(name), np.float32).reshape(spec.shape)
    return bool(np.array_equal(value, np.eye(*spec.shape) if len(spec.shape) == 2 else np.zeros(spec.shape)))


def _vocabulary(directory: ModelDirectory, config: Mapping[str, Any], draft: Draft) -> None:
    """Bring the vocabulary into fairseq's order: the blank first, then `<pad>`, `</s>`, `<unk>`, then the rest.

    A model whose vocabulary has that order keeps its head's bytes. Another one has its rows permuted, and rows that
    fairseq must have and the model does not get zeros and a bias that keeps them from ever being chosen.
    """
    ids = {token: index for token, index in directory.json("vocab.json").items() if isinstance(index, int)}
    rows = draft.tensors["w2v_encoder.proj.bias"].shape[0]
    symbols = [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    blank = config.get("pad_token_id", 0)
    if sorted(ids.values()) != list(range(rows)) or blank not in range(rows):
        detail = f"vocab.json names {len(ids)} ids, the head has {rows} rows, config.json's pad_token_id is {blank}"
        raise PlanError(f"{directory.path}: {detail}", code="dictionary-size", key="vocab.json")
    if blank == 0 and len(symbols) > 4 and symbols[2:4] == list(SPECIAL[2:]) and set(symbols[:2]) == set(SPECIAL[:2]):
        symbols[:2] = SPECIAL[:2]
        draft.dictionary = Dictionary(tuple(symbols), (1,) * rows)
        return
    known = {"<s>": blank, "</s>": ids.get("</s>"), "<unk>": ids.get("<unk>", ids.get("[UNK]"))}
    order: list[int | None] = [known["<s>"], None, known["</s>"], known["<unk>"]]
    order += [index for index in range(rows) if index not in order]
    names = [*SPECIAL, *(symbols[index] for index in order[4:] if index is not None)]
    draft.dictionary = Dictionary(tuple(names), (1,) * len(names))
    draft.notes.append(f"the head's {rows} rows were brought into fairseq's order of {len(names)} symbols")
    for key, filler in (("w2v_encoder.proj.weight", 0.0), ("w2v_encoder.proj.bias", _NEVER)):
        draft.tensors[key] = _permuted(draft.tensors[key], order, filler)


def _permuted(tensor: NewTensor, order: list[int | None], filler: float) -> NewTensor:
    def pieces() -> Iterator[bytes]:
        import numpy as np

        from convert.pieces import cast

        data = b"".join(tensor.pieces())
        width = len(data) // tensor.shape[0]
        row = cast(np.full(width // WIDTHS[tensor.dtype], filler, np.float32), "F32", tensor.dtype)
        yield b"".join(row if index is None else data[index * width : (index + 1) * width] for index in order)

    return replace(tensor, shape=(len(order), *tensor.shape[1:]), pieces=pieces)
