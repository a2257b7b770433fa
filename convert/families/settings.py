"""Settings: what each means to transformers, as data, and typed access to them that collects every problem."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from convert.errors import Problem

MISSING = object()
# what supplies a setting that a checkpoint may lack
_REMEDIES = {
    "normalize": "say whether the waveforms were normalised, as task.normalize of the recipe does: --normalize or --no-normalize"
}


@dataclass(frozen=True, slots=True)
class Value:
    """One value of `config.json`, and where it came from."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Limit:
    """A setting that Hugging Face's class cannot represent unless it has its neutral value.

    Args:
        field: fairseq's setting.
        neutral: says whether a value is neutral.
        why: what is missing on the other side.
        heads: the heads that the limit holds for; all, if it is empty.
        required: whether the limit holds where the setting is absent, too.
        value: the one neutral value, where the way back has to state it.
    """

    field: str
    neutral: Callable[[Any], bool]
    why: str
    heads: tuple[str, ...] = ()
    required: bool = False
    value: Any = MISSING


def must_be(field: str, value: Any, why: str, *heads: str) -> Limit:
    """Make the limit of a setting that has to have one value, and may not be absent."""
    return Limit(field, lambda found: type(found) is type(value) and found == value, why, heads, True, value)


def off(value: Any) -> bool:
    """Say whether a setting is switched off."""
    return not value


def at_most_one(value: Any) -> bool:
    """Say whether a number of parts is that of a model without the feature."""
    return value in (None, 0, 1)


def only(*values: Any) -> Callable[[Any], bool]:
    """Make the test whether a setting has one of these values, or none."""
    return lambda value: value is None or value in values


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of one family, each in one class; a setting that is in none is refused.

    Args:
        same: setting -> field of the configuration with the same meaning and value.
        choices: setting -> (field, setting's word -> field's word).
        limits: what Hugging Face's class cannot represent.
        read: settings that the family's functions read by name.
        training_only: settings that act while training only, or not at all.
        defaults: what fairseq's dataclass says where a checkpoint is silent.
        counts, whole, flags: the names in `same` that are whole numbers above zero, whole numbers, and true or false.
        min_masks: how many masks of time `apply_mask` asks for at least.
        absent: what transformers takes where `config.json` is silent, by field; those of geometry have no default.
    """

    same: Mapping[str, str]
    choices: Mapping[str, tuple[str, Mapping[str, str]]]
    limits: tuple[Limit, ...]
    read: AbstractSet[str]
    training_only: AbstractSet[str]
    defaults: Mapping[str, Any]
    counts: AbstractSet[str]
    whole: AbstractSet[str] = frozenset()
    flags: AbstractSet[str] = frozenset()
    min_masks: int = 2
    absent: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Reader:
    """Reads settings by name and type, notes where each came from, and collects problems.

    Args:
        values: the settings.
        origins: where each stands in the checkpoint, such as `cfg.model.w2v_args.model`.
        problems: what was wrong so far.
        used: the names that were read.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[Problem] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def origin(self, name: str) -> str:
        """Say where a setting stands, such as `cfg.model.dropout`."""
        return (
            f"{self.origins.get(name, 'absent')}.{name}"
            if name in self.origins
            else f"fairseq's default, {name} is not set"
        )

    def get(self, name: str, kind: type, default: Any = MISSING) -> Any:
        """Return a setting of a type; `int` takes no `bool`, `float` takes `int`, and texts of numbers are read.

        A problem is noted, and a harmless value returned, when it is absent without a default, or of another type.
        """
        self.used.add(name)
        value = self.values.get(name, default)
        if value is MISSING or (value is None and default is MISSING):
            self.problems.append(
                Problem(
                    "missing-setting",
                    name,
                    "missing from the checkpoint's settings; it has no safe default",
                    _REMEDIES.get(name, ""),
                )
            )
            return kind()
        if value is None or value is default:
            return default
        if isinstance(value, str) and kind in (int, float):
            try:
                value = kind(value)
            except ValueError:
                value = object()
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 1 << 1000 else math.inf
        wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        if wrong or (kind is float and not math.isfinite(value)):
            text = repr(self.values[name])[:60]
            self.problems.append(Problem("bad-setting", name, f"{kind.__name__} expected, {text} found"))
            return kind()
        return value

    def count(self, name: str, default: Any = MISSING) -> int:
        """Return a setting that counts something: a whole number above zero."""
        value: int = self.get(name, int, default)
        if value < 1 and not any(problem.key == name for problem in self.problems):
            self.problems.append(Problem("bad-setting", name, f"a number above zero expected, {value} found"))
        return value

    def choice(self, name: str, target: str, words: Mapping[str, str]) -> Value:
        """Translate a setting that is one of a few words; another word is refused."""
        value = self.get(name, str)
        if value and value not in words:
            detail = f"{value!r} has no equivalent in transformers; known: {', '.join(words)}"
            self.problems.append(Problem("unsupported-setting", name, detail))
        return Value(target, words.get(value), self.origin(name))

    def convolutions(self, name: str) -> list[tuple[int, int, int]]:
        """Read `conv_feature_layers`: (channels, kernel, stride) of every feature convolution."""
        text = self.get(name, str)
        if not text:
            return []
        try:
            return parse_convolutions(text)
        except ValueError as error:
            self.problems.append(Problem("bad-setting", name, str(error)))
            return []


def carried(reader: Reader, fields: Settings) -> list[Value]:
    """Translate the settings whose value stays what it is."""
    values = []
    for name, target in fields.same.items():
        default = fields.defaults.get(name, MISSING)
        kind = bool if name in fields.flags else int if name in fields.whole else float
        value = reader.count(name, default) if name in fields.counts else reader.get(name, kind, default)
        values.append(Value(target, value, reader.origin(name)))
    return values


def refuse_limited(values: Mapping[str, Any], limits: Iterable[Limit], problems: list[Problem], head: str = "") -> None:
    """Refuse settings that the target cannot represent.

    Args:
        values: the settings.
        limits: what cannot be represented.
        problems: each reason is added here.
        head: the head that is asked for.
    """
    for limit in limits:
        value = values.get(limit.field)
        present = limit.field in values or limit.required
        if (not limit.heads or head in limit.heads) and present and not limit.neutral(value):
            problems.append(Problem("unsupported-setting", limit.field, f"is {value!r}: {limit.why}"))


def parse_convolutions(text: str) -> list[tuple[int, int, int]]:
    """Read fairseq's expression for convolutions without evaluating it: lists of tuples, `+`, and `* number`.

    Args:
        text: such as `[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]`.

    Raises:
        ValueError: it is anything else.

    Example:
        >>> parse_convolutions("[(512, 10, 5)] + [(512, 3, 2)] * 2")
        [(512, 10, 5), (512, 3, 2), (512, 3, 2)]
        >>> parse_convolutions("__import__('os').getcwd()")
        Traceback (most recent call last):
        ValueError: a list of (channels, kernel, stride) expected, "__import__('os').getcwd()" found; nothing was evaluated
    """
    try:
        if len(text) > 4096:
            raise ValueError
        value = _expression(ast.parse(text.strip(), mode="eval").body)
        if not isinstance(value, list) or not 0 < len(value) <= 64:
            raise ValueError
        for layer in value:
            if not isinstance(layer, tuple) or len(layer) != 3 or not all(0 < n < 1 << 20 for n in layer):
                raise ValueError
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"a list of (channels, kernel, stride) expected, {text[:60]!r} found; nothing was evaluated"
        ) from None
    return value


def _expression(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Tuple):
        return tuple(_expression(item) for item in node.elts)
    if isinstance(node, ast.List):
        return [_expression(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _expression(node.left), _expression(node.right)
        if isinstance(left, list) and isinstance(right, list):
            return left + right
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _expression(node.left), _expression(node.right)
        if isinstance(left, int):
            left, right = right, left
        if isinstance(left, list) and isinstance(right, int) and len(left) * right <= 64:
            return left * right
    raise ValueError
