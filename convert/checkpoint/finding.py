"""Find in a file what a conversion needs, whoever wrote it: state_dicts, the prefix of their keys, settings.

Nothing is told by the name of the program that wrote a file. A state_dict holds named tensors, among them one that every model
of some family has; what stands before that name is the prefix. What belongs to it is looked for in what holds it, the nearest
first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from convert.checkpoint.settings import content_of, might_be_settings, read_any, read_settings
from convert.checkpoint.stored import StoredTensor, Stub

_DEEP, _NAMES = 8, 200_000  # levels of a file that are searched; tensors of a pickled module
_CANDIDATES = 16  # settings in a file that are read
_EMA = re.compile(r"(^|[._])ema([._]|$)")
_MODULE = ("_parameters", "_buffers", "_modules")
_NORM = re.compile(r"(.*)\.parametrizations\.weight\.original([01])")


@dataclass(frozen=True, slots=True)
class Anchor:
    """The names that show a model of some family in a state_dict.

    Args:
        key: a tensor of every such model.
        layers: what the names of its layers start with.
        inner: what stands before the encoder's names in the model; both of the above start with it.
        trainer: the project whose trainer writes such models.
    """

    key: str
    layers: str
    inner: str = ""
    trainer: str = "fairseq"


@dataclass(frozen=True, slots=True)
class State:
    """A state_dict inside of a file.

    Args:
        where: the keys that lead to it, joined by dots; empty for the file's own top.
        entries: names and tensors, and what else stands among them.
        roots: prefix -> what shows a model under it, for every model that was found.
        module: the class of the pickled module that it is of, or empty.
        holders: itself and what holds it, from the inside to the file's top; of a module, its attributes.
    """

    where: str
    entries: Mapping[Any, Any]
    roots: Mapping[str, Anchor]
    module: str
    holders: tuple[Mapping[Any, Any], ...]

    @property
    def is_average(self) -> bool:
        """Whether it is called an exponential moving average of the weights."""
        return _EMA.search(self.where) is not None

    def named(self, prefix: str) -> str:
        """Say where a model stands."""
        under = f"under `{prefix}`" if prefix else ""
        inside = f"in `{self.where}`" if self.where else ""
        return " ".join(part for part in (under, inside) if part) or "at the top"


@dataclass(frozen=True, slots=True)
class FoundSettings:
    """The settings of a model in its file.

    Args:
        layout, values: as of `Checkpoint`; `None` where there are none, or several, of which none is nearer to the model.
        where: where they are, if not where fairseq or s3prl puts them; of several, each.
    """

    layout: str = ""
    values: dict[str, Any] | None = None
    where: tuple[str, ...] = ()


def parts_of(value: object) -> Mapping[Any, Any]:
    """Return what a value consists of, by name: a dict, whatever its class, an object's attributes, the items of a list."""
    if is_module(value):
        return module_entries(value)
    if isinstance(value, Stub):
        value = content_of(value)
    if isinstance(value, (list, tuple)):
        return {str(index): part for index, part in enumerate(value) if isinstance(part, (dict, list, tuple, Stub))}
    return value if isinstance(value, dict) else {}


def states(value: object, anchors: Sequence[Anchor]) -> list[State]:
    """List the state_dicts of a file: those with a model, or, where there is none, all that hold tensors."""
    found = list(_states(value, "", (), set(), anchors))
    return [state for state in found if state.roots] or found


def _states(
    value: Any, where: str, holders: tuple[Mapping[Any, Any], ...], seen: set[int], anchors: Sequence[Anchor]
) -> Iterator[State]:
    parts = parts_of(value)
    if not parts or id(value) in seen:
        return
    seen.add(id(value))
    holders = (value.state if is_module(value) else parts, *holders)
    roots: Mapping[str, Anchor] = {}
    if any(isinstance(entry, (StoredTensor, Stub)) for entry in parts.values()):
        roots = find_roots((name for name in parts if isinstance(name, str)), anchors)
    if roots or any(isinstance(entry, StoredTensor) for entry in parts.values()):
        yield State(where, parts, roots, str(value.type) if isinstance(value, Stub) else "", holders)
    if not roots and len(holders) < _DEEP:
        for name, child in parts.items():
            if isinstance(name, str) and "." not in name:
                yield from _states(child, f"{where}.{name}" if where else name, holders, seen, anchors)


def find_roots(names: Iterable[str], anchors: Sequence[Anchor]) -> dict[str, Anchor]:
    """Find the prefixes under which models stand.

    Example:
        >>> anchor = Anchor("w2v_encoder.w2v_model.mask_emb", "w2v_encoder.w2v_model.encoder.layers.", "w2v_encoder.w2v_model.")
        >>> names = ["module." + anchor.key, "module." + anchor.layers + "0.fc1.weight"]
        >>> list(find_roots(names, [anchor]))
        ['module.']
    """
    listed = list(names)
    ends = [(f".{one.key}", one) for one in sorted(anchors, key=lambda one: -len(one.key))]
    found: dict[str, Anchor] = {}
    for name in listed:
        for end, anchor in ends:
            if name.endswith(end) or name == anchor.key:
                found.setdefault(name.removesuffix(anchor.key), anchor)
                break
    # wav2vec 1.0 and vq-wav2vec start with the same convolutions, and have no such layers
    layers = {prefix: prefix + anchor.layers for prefix, anchor in found.items()}
    return {prefix: found[prefix] for prefix, start in layers.items() if any(name.startswith(start) for name in listed)}


def find_settings(value: object, state: State, name: str) -> FoundSettings:
    """Find the settings of a model: in what holds it, or else those that the file has once, wherever they are.

    Args:
        value: what the file holds.
        state: the model's state_dict.
        name: the file's name, for errors.

    Raises:
        CheckpointError: `corrupted-settings`.
    """
    for holder in state.holders:
        near = read_settings(holder, name)
        if near is not None:
            return FoundSettings(*near)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, part in _candidates(value):
        known = read_any(part, name)
        if known is not None:
            found[where] = known
        if len(found) == _CANDIDATES:
            break
    if not found:
        return FoundSettings()
    layout, values = next(iter(found.values()))
    alike = all(other == values for _, other in found.values())
    return FoundSettings(layout, values, (next(iter(found)),)) if alike else FoundSettings(where=tuple(found))


def _candidates(value: object) -> Iterator[tuple[str, Any]]:
    """Yield what may be settings, and where it is; not what is inside of it."""
    pending: list[tuple[str, Any, int]] = [("", value, 0)]
    seen: set[int] = set()
    while pending:
        where, item, depth = pending.pop()
        parts = {} if id(item) in seen else parts_of(item)
        seen.add(id(item))
        if might_be_settings(parts):
            yield where, item
        elif depth < _DEEP:
            pending += [
                (f"{where}.{name}" if where else name, child, depth + 1)
                for name, child in reversed(list(parts.items()))
                if isinstance(name, str) and isinstance(child, (dict, list, tuple, Stub))
            ]


def fairseq_names(names: Iterable[str]) -> dict[str, str]:
    """Give tensors the names of fairseq's own classes: those that have others, with the names that they have.

    torch's newer weight norm calls magnitude and direction `parametrizations.weight.original0` and `original1`, and some
    forks keep the positional convolution behind a module without tensors.

    Example:
        >>> fairseq_names(["encoder.pos_conv.1.parametrizations.weight.original1", "mask_emb"])
        {'encoder.pos_conv.0.weight_v': 'encoder.pos_conv.1.parametrizations.weight.original1'}
    """
    known = list(names)
    first = any(re.search(r"(^|\.)encoder\.pos_conv\.(0|1\.0)\.", name) for name in known)
    made: dict[str, str] = {}
    for name in known:
        plain = name if first else re.sub(r"(^|\.)encoder\.pos_conv\.1\.", r"\1encoder.pos_conv.0.", name)
        norm = _NORM.fullmatch(plain)
        plain = f"{norm[1]}.weight_{'gv'[int(norm[2])]}" if norm else plain
        if plain != name:
            made[plain] = name
    taken = made.keys() & set(known)
    return {plain: name for plain, name in made.items() if plain not in taken}


def is_module(value: object) -> TypeGuard[Stub]:
    """Say whether a value is a pickled `torch.nn.Module`."""
    state = value.state if isinstance(value, Stub) else None
    return isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in _MODULE)


def module_entries(module: Stub) -> dict[str, Any]:
    """Return the `state_dict()` of a pickled module: parameters and buffers by their modules' names."""
    made: dict[str, Any] = {}
    pending: list[tuple[str, Stub, int]] = [("", module, 0)]
    while pending and len(made) + len(pending) < _NAMES:
        prefix, stub, depth = pending.pop()
        passing = stub.state.get("_non_persistent_buffers_set")
        for part in ("_parameters", "_buffers"):
            for name, value in stub.state[part].items():
                if isinstance(name, str) and isinstance(value, StoredTensor) and not _holds(passing, name):
                    made[prefix + name] = value
        if depth < 60:
            children = stub.state["_modules"].items()
            pending += [(f"{prefix}{name}.", child, depth + 1) for name, child in children if is_module(child)]
    return made


def _holds(names: object, name: str) -> bool:
    return isinstance(names, set) and name in names
