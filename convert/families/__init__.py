"""The families of models, one file each, found by what it declares: a `Family` named `FAMILY`.

In: an opened checkpoint and a request, or names and shapes alone. Out: a `Conversion`, which says everything that will be
done, or every reason to refuse; or a table. Standard library only. A new family is a new file here; see
docs/adding_a_family.md.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import replace

from convert.checkpoint import Checkpoint
from convert.errors import PlanError
from convert.families.base import Conversion, Family, Request, Sources
from convert.families.encoder import ANCHORS as ENCODER
from convert.families.encoder_settings import encoder_settings, origin_of
from convert.families.interface import Interface, encoder_interface
from convert.families.planning import unknown_language
from convert.families.settings import Reader
from convert.rules import Drop

__all__ = [
    "ANCHORS",
    "FAMILIES",
    "Conversion",
    "Family",
    "Interface",
    "Request",
    "architecture_of",
    "describe",
    "family_of",
    "interface_of",
    "of_class",
    "settings_of",
    "sources_of",
]


def _found() -> dict[str, Family]:
    """Import every module here; those that only some models are told by come first, each group by its name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    families = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.name: family for family in sorted(families, key=lambda family: (family.general, family.name))}


FAMILIES = _found()
# what shows a model in files of other programs
ANCHORS = tuple(dict.fromkeys((*ENCODER, *(one for family in FAMILIES.values() for one in family.anchors))))
# fairseq's name of a model -> (the family that declares it, the kind of checkpoint)
ARCHITECTURES = {name: (family, kind) for family in FAMILIES.values() for name, kind in family.architectures.items()}
HEADS = [*sorted({kind.name for _, kind in ARCHITECTURES.values()}), "encoder"]  # what may be asked for of a model
_REFUSED = {name: reason for family in FAMILIES.values() for name, reason in family.refused.items()}


def describe(checkpoint: Checkpoint, request: Request) -> Conversion:
    """Decide everything about a conversion, or refuse it with every reason.

    Args:
        checkpoint: the opened checkpoint.
        request: what the caller asks for.

    Raises:
        PlanError: every problem of settings, vocabulary, names and shapes at once.
    """
    sources, whole = sources_of(checkpoint, request)
    if request.data_config is not None and not sources.kind.data_config:
        detail = f"{sources.name} has no config.yaml: leave --data-config out"
        raise PlanError(detail, code="usage", key="--data-config")
    if checkpoint.groups and sources.family.languages is None:
        detail = "the file has adapters of languages, which a model of this layer_type does not use"
        sources.refuse("conflict", "layer_type", detail)
    model = whole.describe(sources)
    if request.language and not model.language:
        raise unknown_language(checkpoint.path.name, request.language, ())
    reason = f"does not start with {checkpoint.prefix}, as the model's names do: it belongs to another model"
    # a relic: fairseq's model does not have it, so that the way back leaves it out
    left_out = tuple(Drop(name, reason, relic=True) for name in checkpoint.outside)
    left_out += tuple(Drop(name, "is not a tensor, and no weight of a model", relic=True) for name in checkpoint.aside)
    return replace(model, left_out=left_out, notes=(*model.notes, *checkpoint.notes))


def interface_of(checkpoint: Checkpoint, request: Request, made: Conversion) -> Interface:
    """Describe how a model is fed and how its output is read.

    Args:
        checkpoint, request: as for `describe`.
        made: what `describe` decided about them.
    """
    sources, whole = sources_of(checkpoint, request)
    return (whole.interface or encoder_interface)(sources, made)


def sources_of(checkpoint: Checkpoint, request: Request) -> tuple[Sources, Family]:
    """Gather what a conversion is decided from, and find the family that decides."""
    name = architecture_of(checkpoint)
    if name not in ARCHITECTURES:
        raise _unsupported(checkpoint, name, ARCHITECTURES)
    owner, kind = ARCHITECTURES[name]
    reader = settings_of(checkpoint)
    family = family_of(checkpoint, reader)
    whole = family if owner.encoders else owner
    outer, task = (
        Reader(dict(values), dict.fromkeys(values, section), reader.problems)
        for section, values in ((section, checkpoint.settings[section]) for section in ("model", "task"))
    )
    head = request.head or (kind.name if kind.name in whole.classes else "encoder")
    return Sources(checkpoint, request, name, kind, family, head, reader, outer, task), whole


def settings_of(checkpoint: Checkpoint) -> Reader:
    """Read the settings of a model, or of the encoder in it, with what fine-tuning replaced.

    Raises:
        PlanError: it was fine-tuned, and its pretrained model's settings are missing.
    """
    _, kind = ARCHITECTURES.get(architecture_of(checkpoint), (None, None))
    if kind is not None and kind.nested:
        return encoder_settings(checkpoint)
    model = checkpoint.settings["model"]
    return Reader(dict(model), dict.fromkeys(model, origin_of(checkpoint)))


def family_of(checkpoint: Checkpoint, reader: Reader) -> Family:
    """Find the family of a model's encoder by what its settings say, or of the model, where it has no encoder in it.

    Where omegaconf dropped the encoder's name, its tensors tell.

    Raises:
        PlanError: `unsupported-architecture`.
    """
    architecture = architecture_of(checkpoint)
    owner, kind = ARCHITECTURES[architecture]
    if not owner.encoders and not owner.inside:
        return owner
    known = {encoder: family for family in owner.inside or FAMILIES.values() for encoder in family.encoders}
    name = str(reader.values.get("_name") or "") or ("" if kind.nested else architecture)
    if not name:
        names = [key.removeprefix("encoder.w2v_model.") for key in checkpoint.tensors]
        name = next(family.encoders[0][0] for family in known.values() if family.knows(names))
    layer = str(reader.values.get("layer_type") or "transformer")
    found = known.get((name, layer)) or known.get((name, "transformer"))  # whose limits name the layer type
    if found is None:
        raise _unsupported(checkpoint, name, dict.fromkeys(name for name, _ in known))
    return found


def of_class(name: str, architecture: str = "") -> Family | None:
    """Find the family of a class of transformers; of several, the one that declares fairseq's architecture."""
    found = [family for family in FAMILIES.values() if name in family.classes.values()]
    declared = [family for family in found if architecture in family.architectures]
    return next(reversed(declared or found), None)


def architecture_of(checkpoint: Checkpoint) -> str:
    """Name a checkpoint's architecture; where its settings do not (omegaconf dropped `_name` for a time), by its tensors."""
    named = str(checkpoint.settings["model"].get("_name") or "")
    named = named or next(
        (name for name, (_, kind) in ARCHITECTURES.items() if kind.layout and kind.layout == checkpoint.layout), ""
    )
    if named:
        return named
    for family in FAMILIES.values():
        if family.knows(checkpoint.tensors):
            for name, kind in family.architectures.items():
                if kind.mark and any(re.search(kind.mark, key) for key in checkpoint.tensors):
                    return name
    return "unknown"


def _unsupported(checkpoint: Checkpoint, name: str, known: Iterable[str]) -> PlanError:
    reason = f" ({_REFUSED[name]})" if name in _REFUSED else ""
    return PlanError(
        f"{checkpoint.path.name}: architecture {name!r} is not supported{reason}; nothing was written",
        code="unsupported-architecture",
        key=name,
        hint=f"supported: {', '.join(known)}",
    )
