"""Rules between fairseq's names and Hugging Face's, and tables of exact keys.

Standard library only: names, shapes and dtypes. `source` is fairseq, `target` Hugging Face; a table's `inverse` swaps the two.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from convert.errors import PlanError, Problem

_AXIS = re.compile(r"\{(\w+)\}")
T = TypeVar("T")
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without its bytes; `dtype` is a safetensors name such as `F32`, or empty for any."""

    name: str
    shape: tuple[int, ...]
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Rename:
    """One tensor keeps its bytes and gets another name.

    Args:
        source: fairseq's key, with named axes such as `{layer}`.
        target: Hugging Face's key, with the same axes.
        shape: the names of its dimensions (or numbers), separated by spaces; axes may stand in them.
        dtype: what it must be where that is not a floating point type, such as `I64` for a counter; no conversion changes it.
        skip: how many rows (of its first axis) the source has before those that the target takes.

    Raises:
        ValueError: the two keys have different axes.
    """

    source: str
    target: str
    shape: str
    dtype: str = ""
    skip: int = 0

    def __post_init__(self) -> None:
        ours, theirs = sorted(_AXIS.findall(self.source)), sorted(_AXIS.findall(self.target))
        if ours != theirs:
            raise ValueError(f"axes differ: {self.source!r} has {ours}, {self.target!r} has {theirs}")


@dataclass(frozen=True, slots=True)
class Drop:
    """A source tensor that has no place in the target, and why. `shape` may be empty: it is not checked then.

    Args:
        source: fairseq's key.
        reason: why the tensor is not needed.
        optional: whether it may be absent, as relics of other versions are.
        repeats: the source tensor whose bytes it repeats. A conversion proves that, and the way back writes it again.
        constant: the number that it always holds, so that the way back can write it; `None` where it holds more.
        relic: whether today's fairseq does not have it, so that the way back leaves it out.
    """

    source: str
    reason: str
    shape: str = ""
    optional: bool = False
    repeats: str = ""
    constant: float | None = None
    relic: bool = False

    @property
    def record(self) -> dict[str, object]:
        """What `conversion.json` keeps of it."""
        kept: dict[str, object] = {"key": self.source, "reason": self.reason}
        kept |= {"repeats": self.repeats} if self.repeats else {}
        kept |= {"relic": True} if self.relic else {}
        return kept if self.constant is None else kept | {"constant": self.constant}


@dataclass(frozen=True, slots=True)
class Zeros:
    """Fills a tensor with zeros."""

    def __str__(self) -> str:
        return "zeros"


@dataclass(frozen=True, slots=True)
class Identity:
    """Fills a matrix with ones on its diagonal, zeros elsewhere."""

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True, slots=True)
class NormOf:
    """Fills a tensor with the Euclidean norm of another target tensor over all axes but the last."""

    key: str

    def __str__(self) -> str:
        return f"norm of {self.key}"


@dataclass(frozen=True, slots=True)
class Sinusoids:
    """Fills a tensor with rows of the table of `fairseq.modules.SinusoidalPositionalEmbedding`, from row `first`."""

    first: int

    def __str__(self) -> str:
        return f"sinusoids from row {self.first}"


What = Zeros | Identity | NormOf | Sinusoids


@dataclass(frozen=True, slots=True)
class Fill:
    """A target tensor that no source tensor holds, what it is filled with, and why.

    Args:
        target: Hugging Face's key.
        what: its content; as text it is what `conversion.json` keeps.
        reason: why there is no source.
        shape: the names of its dimensions.
    """

    target: str
    what: What
    reason: str
    shape: str

    def renamed(self, rename: Callable[[str], str]) -> Fill:
        """Change its key, and the key that its content comes from."""
        what = NormOf(rename(self.what.key)) if isinstance(self.what, NormOf) else self.what
        return replace(self, target=rename(self.target), what=what)

    @property
    def record(self) -> dict[str, object]:
        """What `conversion.json` keeps of it."""
        return {"key": self.target, "rule": str(self.what), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Add:
    """Adds a number to every element of a row."""

    value: float
    rule = "add"


@dataclass(frozen=True, slots=True)
class Set:
    """Sets every element of a row to a number."""

    value: float
    rule = "set"


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of one row of a target tensor that a setting asks for, after it was copied.

    It has no inverse, as rounding has none: a conversion keeps the row's bytes for the way back.

    Args:
        target: Hugging Face's key.
        row: the row (first axis) that changes.
        what: what is done to it.
        reason: the setting that asks for it.
    """

    target: str
    row: int
    what: Add | Set
    reason: str

    @property
    def record(self) -> dict[str, object]:
        """What `conversion.json` keeps of it."""
        what = {"rule": self.what.rule, "value": self.what.value}
        return {"key": self.target, "row": self.row, **what, "reason": self.reason}


Rule = Rename | Drop | Fill


@dataclass(frozen=True, slots=True)
class Table:
    """The exact conversion of one model: every rule expanded to keys without axes, by `Table.build`.

    Args:
        name: what it converts, such as `wav2vec2 ctc`.
        renames: source key -> target key.
        drops: source key -> rule.
        fills: target key -> rule.
        shapes: the shape of every target key.
        edits: changes of single rows.
        dtypes: target key -> its dtype, of those that are not floating point numbers.
        skips: target key -> how many rows of its source come before those that it takes.
    """

    name: str
    renames: Mapping[str, str]
    drops: Mapping[str, Drop]
    fills: Mapping[str, Fill]
    shapes: Mapping[str, tuple[int, ...]]
    edits: tuple[Edit, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=dict)
    skips: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        name: str,
        rules: Iterable[Rule],
        axes: Mapping[str, Sequence[object]],
        dims: Mapping[str, int],
        edits: Iterable[Edit] = (),
    ) -> Table:
        """Expand rules to exact keys.

        Args:
            name: what the table converts.
            rules: the rules; no two may name the same source or the same target.
            axes: the values of every axis, such as `{"layer": range(12)}`.
            dims: the size of every named dimension.
            edits: changes of single rows.

        Raises:
            PlanError: `duplicate-source` or `duplicate-target`, every one of them.
            KeyError: an axis or a dimension has no value.
        """
        renames, drops, fills = list[Rename](), list[Drop](), list[Fill]()
        shapes: dict[str, tuple[int, ...]] = {}
        for rule in rules:
            for values in _grid(rule, axes):
                shape = tuple(int(n) if n.isdigit() else dims[n] for n in rule.shape.format(**values).split())
                text = " ".join(map(str, shape))
                if isinstance(rule, Rename):
                    source, target = rule.source.format(**values), rule.target.format(**values)
                    renames.append(replace(rule, source=source, target=target, shape=text))
                    shapes[target] = shape
                elif isinstance(rule, Fill):
                    exact = rule.renamed(lambda key, values=values: key.format(**values))  # type: ignore[misc]
                    fills.append(replace(exact, shape=text))
                    shapes[exact.target] = shape
                else:
                    drops.append(replace(rule, source=rule.source.format(**values), shape=text))
        sources = [rule.source for rule in renames] + [drop.source for drop in drops]
        _refuse_repeated(name, sources, [rule.target for rule in renames] + [fill.target for fill in fills])
        return cls(
            name,
            renames={rule.source: rule.target for rule in renames},
            drops={drop.source: drop for drop in drops},
            fills={fill.target: fill for fill in fills},
            shapes=shapes,
            edits=tuple(edits),
            dtypes={rule.target: rule.dtype for rule in renames if rule.dtype},
            skips={rule.target: rule.skip for rule in renames if rule.skip},
        )

    def source_shape(self, target: str) -> tuple[int, ...]:
        """Return the shape of the source of a target tensor: with the rows that the target leaves out."""
        shape = self.shapes[target]
        return (shape[0] + self.skips[target], *shape[1:]) if target in self.skips else shape

    @property
    def target(self) -> dict[str, TensorSpec]:
        """The complete target inventory, of any dtype."""
        return {key: TensorSpec(key, shape) for key, shape in self.shapes.items()}

    @property
    def source(self) -> dict[str, TensorSpec]:
        """The source inventory that the table expects, without optional drops whose shape is free."""
        kept = {key: TensorSpec(key, self.source_shape(target)) for key, target in self.renames.items()}
        return kept | {
            key: TensorSpec(key, tuple(map(int, drop.shape.split())))
            for key, drop in self.drops.items()
            if not drop.optional
        }

    @property
    def inverse(self) -> Table:
        """The table that leads back: every rename turned round, fills become drops; it has no edits.

        Drops have no inverse: a table with drops leads back to the tensors that it kept.
        """
        made = "made by the rule `{0.what}`: {0.reason}"
        drops = {key: Drop(key, made.format(fill), fill.shape) for key, fill in self.fills.items()}
        shapes = {source: self.shapes[target] for source, target in self.renames.items()}
        dtypes = {source: self.dtypes[target] for source, target in self.renames.items() if target in self.dtypes}
        return Table(f"{self.name} inverse", {t: s for s, t in self.renames.items()}, drops, {}, shapes, (), dtypes)

    @property
    def digest(self) -> str:
        """The SHA-256 of everything the table says."""
        lines = [f"{s} {t} {self.shapes[t]}" for s, t in self.renames.items()]
        lines += [f"{key} {dtype}" for key, dtype in self.dtypes.items()]
        lines += [f"{key} dropped" for key in self.drops]
        lines += [f"{key} repeats {drop.repeats}" for key, drop in self.drops.items() if drop.repeats]
        lines += [f"{key} {fill.what} {self.shapes[key]}" for key, fill in self.fills.items()]
        lines += [f"{edit.target} {edit.row} {edit.what.rule} {edit.what.value!r}" for edit in self.edits]
        lines += [f"{target} skips {rows}" for target, rows in self.skips.items()]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

    def joined(self, other: Table, name: str, prefix: str = "") -> Table:
        """Make the table of a model that consists of this one, its target keys behind a prefix, and of another.

        Raises:
            PlanError: `duplicate-source` or `duplicate-target`, every one of them.
        """
        ours = replace(
            self,
            renames={source: prefix + target for source, target in self.renames.items()},
            fills={prefix + key: fill.renamed(prefix.__add__) for key, fill in self.fills.items()},
            shapes={prefix + key: shape for key, shape in self.shapes.items()},
            edits=tuple(replace(edit, target=prefix + edit.target) for edit in self.edits),
            dtypes={prefix + key: dtype for key, dtype in self.dtypes.items()},
            skips={prefix + key: rows for key, rows in self.skips.items()},
        )
        sources = [source for table in (ours, other) for source in (*table.renames, *table.drops)]
        _refuse_repeated(name, sources, [*ours.shapes, *other.shapes])
        mappings = ("renames", "drops", "fills", "shapes", "dtypes", "skips")
        both: dict[str, Any] = {field: {**getattr(ours, field), **getattr(other, field)} for field in mappings}
        return Table(name, **both, edits=ours.edits + other.edits)

    def rename_key(self, key: str) -> str | None:
        """Translate one source key; `None` for a key that is dropped.

        Raises:
            PlanError: `unexpected-tensor`.
        """
        if key not in self.renames and key not in self.drops:
            raise PlanError(f"table {self.name!r} does not know {key}", code="unexpected-tensor", key=key)
        return self.renames.get(key)

    def map_state_dict(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Translate the keys of a state_dict; the values are handed on as they are, dropped ones left out.

        Args:
            state_dict: source keys with tensors of any kind. Every one must be known, and none may be missing.

        Returns:
            The tensors under their target names, in the table's order, without what the table fills.

        Raises:
            PlanError: `unexpected-tensor` and `missing-tensor`, every one of them.
        """
        optional = {key for key, drop in self.drops.items() if drop.optional}
        wanted = {*self.renames, *self.drops} - optional
        strange = [key for key in state_dict if key not in wanted | optional]
        problems = [Problem("unexpected-tensor", key, "has no place in the model") for key in strange]
        problems += [Problem("missing-tensor", key, "is not in the state_dict") for key in wanted - set(state_dict)]
        if problems:
            raise PlanError(f"{len(problems)} keys do not fit table {self.name!r}", code="keys", problems=problems)
        return {target: state_dict[source] for source, target in self.renames.items()}


def add_prefix(rules: Iterable[Rule], *, source: str = "", target: str = "") -> list[Rule]:
    """Put prefixes before the keys of rules, such as `w2v_encoder.w2v_model.` and `wav2vec2.`."""
    made: list[Rule] = []
    for rule in rules:
        if isinstance(rule, Rename):
            made.append(replace(rule, source=source + rule.source, target=target + rule.target))
        elif isinstance(rule, Fill):
            made.append(rule.renamed(target.__add__))
        else:
            repeats = source + rule.repeats if rule.repeats else ""
            made.append(replace(rule, source=source + rule.source, repeats=repeats))
    return made


def _grid(rule: Rule, axes: Mapping[str, Sequence[object]]) -> Iterable[dict[str, object]]:
    text = rule.target if isinstance(rule, Fill) else rule.source
    names = list(dict.fromkeys(_AXIS.findall(text)))
    for values in itertools.product(*(axes[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def _refuse_repeated(name: str, sources: Iterable[str], targets: Iterable[str]) -> None:
    problems = [
        Problem(code, key, f"{count} rules name it")
        for code, keys in (("duplicate-source", sources), ("duplicate-target", targets))
        for key, count in Counter(keys).items()
        if count > 1
    ]
    if problems:
        raise PlanError(f"table {name!r} contradicts itself", code=problems[0].code, problems=problems)
