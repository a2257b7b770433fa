"""What conversion.json holds, so that one that was changed is refused by its key before anything is made of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from convert.checkpoint.dictionary import SPECIAL
from convert.checkpoint.settings import TooLargeError, plain_data


@dataclass(frozen=True, slots=True)
class Or:
    """Either of two: such as a dictionary, or nothing."""

    one: Any
    other: Any


@dataclass(frozen=True, slots=True)
class Each:
    """A dict of any keys that a pattern matches, with values of one kind."""

    value: Any
    key: str = ".*"


def _plain(value: Any) -> bool:
    try:
        plain_data(value)
    except TooLargeError:
        return False
    return isinstance(value, dict)


def _hexadecimal(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("([0-9a-f]{2})*", value) is not None


def _count(value: Any) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


_FILE = r"[A-Za-z0-9_][\w.-]{0,200}"  # a name in the directory itself, and never a path
_SECTIONS: dict[str, Any] = {"model": {"...?": None}, "task": dict, "criterion": dict}
_SECTIONS["model"]["w2v_args?"] = lambda value: not isinstance(value, dict) or not any(misfits(value, _SECTIONS))
_SYMBOLS = {"symbols": [str], "counts": [_count], "special?": [str]}


def _dictionary(value: Any) -> bool:
    if any(misfits(value, _SYMBOLS)) or len(value["counts"]) != len(value["symbols"]):
        return False
    return {*value.get("special", SPECIAL)} <= {*value["symbols"][: len(SPECIAL)]}


_ASKED = {"head?": Or(str, type(None)), "keep_final_proj?": bool, "language?": Or(str, type(None))}
_ASKED |= {"ema?": bool}
# A type, a predicate, a list of one kind, or a dict by key. A key with a question mark may be absent, as earlier versions
# wrote fewer; with `...?`, others may be there.
RECORD = {
    "architecture": {"fairseq": str, "...?": None},
    "dictionaries?": [_dictionary],
    "dictionary?": Or(_dictionary, type(None)),
    "drops": [{"key": str, "reason": str, "constant?": float, "repeats?": str, "relic?": bool}],
    "dtype": lambda value: value in ("keep", "float32", "float16", "bfloat16"),
    "edited_rows?": Each(Each(_hexadecimal, r"\d{1,9}")),
    "edits?": [{"key": str, "row": int, "rule": str, "value": Or(float, int), "reason": str}],
    "files": Each({"sha256": str, "size": int}, _FILE),
    "fills": [{"key": str, "rule": str, "reason": str}],
    "language?": str,
    "languages?": Each(_dictionary, r"[\w-]{1,80}"),
    "left_rows?": Each(_hexadecimal),
    "request?": _ASKED | {"data_config?": _plain},
    "settings": lambda value: _plain(value) and not any(misfits(value, _SECTIONS)),
    "sidecars?": Each({"group": str, "tensors": Each(str)}, _FILE + r"\.safetensors"),
    "source?": dict,
    "tensors": Each(str),
    "training_only?": dict,
    "...?": None,
}


def misfits(value: Any, kind: Any = RECORD, name: str = "") -> Iterator[str]:
    """Name the keys of a record that hold something else than a conversion writes.

    Args:
        value: the record, or a part of it.
        kind: what it should be; see `RECORD`.
        name: the part's own key, for those inside.
    """
    if isinstance(kind, Or):
        if not any(next(misfits(value, one), None) is None for one in (kind.one, kind.other)):
            yield name or "the whole"
    elif isinstance(kind, dict):
        yield from _inside(value, kind, name)
    elif isinstance(kind, Each):
        if not isinstance(value, dict):
            yield name or "the whole"
            return
        for key, item in value.items():
            if not re.fullmatch(kind.key, key, re.DOTALL | re.ASCII):
                yield f"{name}: {key[:60]!r}"
            yield from misfits(item, kind.value, f"{name}.{key}")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield name or "the whole"
            return
        for index, item in enumerate(value):
            yield from misfits(item, kind[0], f"{name}[{index}]")
    elif not _is(value, kind):
        yield name or "the whole"


def _inside(value: Any, kind: dict[str, Any], name: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield name or "the whole"
        return
    for key, inner in kind.items():
        known = key.removesuffix("?")
        if known in value:
            yield from misfits(value[known], inner, f"{name}.{known}" if name else known)
        elif known == key:
            yield f"{name}.{key}" if name else key
    if "...?" not in kind:
        yield from (f"{name}.{key[:60]}" for key in value if key not in kind and f"{key}?" not in kind)


def _is(value: Any, kind: type | Callable[[Any], bool]) -> bool:
    return isinstance(value, kind) if isinstance(kind, type) else kind(value)
