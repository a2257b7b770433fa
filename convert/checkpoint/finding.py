"""Find in a file what a conversion needs, whoever wrote it: the state_dict, the prefix of its keys, settings, dictionaries.

Nothing is told by the name of the program that wrote a file. A state_dict is a dict (or a pickled module) in which a key
stands that every model of some family has; what stands before that key is the prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert.checkpoint.stored import StoredTensor, Stub

FAIRSEQ2 = "encoder_frontend.post_extract_layer_norm.weight"  # a tensor of every encoder of fairseq2's
# keys that stand before an encoder in the models that fairseq builds around one, the longest first
INNER = ("w2v_encoder.w2v_model.", "encoder.w2v_model.", "")
_FIRST = "feature_extractor.conv_layers.0.0.weight"
ANCHORS = {inner + _FIRST: inner for inner in INNER} | {"encoder.subsample.conv_layers.0.weight": "", FAIRSEQ2: ""}
_DEEP, _NAMES = 3, 200_000  # levels of a file that are searched for state_dicts; tensors of a pickled module
_EMA = re.compile(r"(^|[._])ema([._]|$)")
_MODULE = ("_parameters", "_buffers", "_modules")
_NORM = re.compile(r"(.*)\.parametrizations\.weight\.original([01])")


@dataclass(frozen=True, slots=True)
class State:
    """A state_dict inside of a file.

    Args:
        where: the keys that lead to it, joined by dots; empty for the file's own top.
        entries: names and tensors, and what else stands among them.
        roots: prefix -> which key of `INNER` follows it, for every model that was found.
        module: the class of the pickled module that it is of, or empty.
    """

    where: str
    entries: Mapping[str, Any]
    roots: Mapping[str, str]
    module: str

    @property
    def is_average(self) -> bool:
        """Whether it is called an exponential moving average of the weights."""
        return _EMA.search(self.where) is not None

    def named(self, prefix: str) -> str:
        """Say where a model stands."""
        under = f"under `{prefix}`" if prefix else ""
        inside = f"in `{self.where}`" if self.where else ""
        return " ".join(part for part in (under, inside) if part) or "at the top"


def states(value: Any) -> list[State]:
    """List the state_dicts of a file: those with a model, or, where there is none, all that hold tensors."""
    found = list(_states(value, "", set()))
    return [state for state in found if state.roots] or found


def _states(value: Any, where: str, seen: set[int]) -> Iterator[State]:
    entries = module_entries(value) if is_module(value) else value
    if not isinstance(entries, dict) or id(value) in seen:
        return
    seen.add(id(value))
    roots = find_roots(name for name in entries if isinstance(name, str))
    if roots or any(isinstance(entry, StoredTensor) for entry in entries.values()):
        yield State(where, entries, roots, str(value.type) if isinstance(value, Stub) else "")
    if not roots and where.count(".") < _DEEP - 1:
        for name, child in entries.items():
            if isinstance(name, str) and "." not in name:
                yield from _states(child, f"{where}.{name}" if where else name, seen)


def find_roots(names: Iterable[str]) -> dict[str, str]:
    """Find the prefixes under which models stand.

    Example:
        >>> names = ["feature_extractor.conv_layers.0.0.weight", "encoder.layer_norm.bias"]
        >>> find_roots(["module.w2v_encoder.w2v_model." + name for name in names])
        {'module.': 'w2v_encoder.w2v_model.'}
    """
    listed = list(names)
    found: dict[str, str] = {}
    for name in listed:
        for anchor, inner in ANCHORS.items():
            if name == anchor or name.endswith(f".{anchor}"):
                found.setdefault(name.removesuffix(anchor), inner)
                break
    # wav2vec 1.0 and vq-wav2vec start with the same convolutions, and have no encoder
    encoders = {prefix: f"{prefix}{inner}encoder." for prefix, inner in found.items()}
    return {
        prefix: found[prefix] for prefix, start in encoders.items() if any(name.startswith(start) for name in listed)
    }


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


def is_module(value: Any) -> bool:
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


def _holds(names: Any, name: str) -> bool:
    return isinstance(names, set) and name in names
