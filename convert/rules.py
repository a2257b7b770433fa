"""Rules between fairseq's names and Hugging Face's, tables of exact keys, and the planner that proves a table complete.

Standard library only: tensors never appear here, only their names, shapes and dtypes. `source` is always fairseq,
`target` is always Hugging Face (a table's `inverse` swaps the two).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from convert.errors import PlanError, Problem

_AXIS = re.compile(r"\{(\w+)\}")
Dims = Mapping[str, int]
Axes = Mapping[str, Sequence[object]]
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

    Example:
        >>> Rename("encoder.layers.{layer}.fc1.bias", "encoder.layers.{n}.fc1.bias", "ffn")
        Traceback (most recent call last):
        ValueError: axes differ: 'encoder.layers.{layer}.fc1.bias' has ['layer'], 'encoder.layers.{n}.fc1.bias' has ['n']
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

    @property
    def inverse(self) -> Drop:
        """What the way back does with the tensor."""
        return Drop(self.target, f"made by the rule `{self.what}`: {self.reason}", self.shape)

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
        change = {"rule": self.what.rule, "value": self.what.value}
        return {"key": self.target, "row": self.row, **change, "reason": self.reason}


Rule = Rename | Drop | Fill


@dataclass(frozen=True, slots=True)
class Table:
    """The exact conversion of one model: every rule expanded to keys without axes.

    Args:
        name: what it converts, such as `wav2vec2 ctc`.
        renames: source key -> (target key, shape).
        drops: source key -> rule.
        fills: target key -> rule.
        shapes: the shape of every target key.
        edits: changes of single rows.
        dtypes: target key -> its dtype, of those that are not floating point numbers.
        skips: target key -> how many rows of its source come before those that it takes.

    Build one with `Table.build`.
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
    def build(cls, name: str, rules: Iterable[Rule], axes: Axes, dims: Dims, edits: Iterable[Edit] = ()) -> Table:
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
        renames: list[tuple[str, str]] = []
        drops: list[Drop] = []
        fills: list[Fill] = []
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        skips: dict[str, int] = {}
        for rule in rules:
            for values in _grid(rule, axes):
                shape = _shape(rule.shape.format(**values), dims)
                if isinstance(rule, Rename):
                    renames.append((rule.source.format(**values), rule.target.format(**values)))
                    shapes[renames[-1][1]] = shape
                    dtypes |= {renames[-1][1]: rule.dtype} if rule.dtype else {}
                    skips |= {renames[-1][1]: rule.skip} if rule.skip else {}
                elif isinstance(rule, Fill):
                    exact = rule.renamed(lambda key, values=values: key.format(**values))  # type: ignore[misc]
                    fills.append(replace(exact, shape=" ".join(map(str, shape))))
                    shapes[fills[-1].target] = shape
                else:
                    drops.append(replace(rule, source=rule.source.format(**values), shape=" ".join(map(str, shape))))
        _refuse_repeated(
            name,
            [source for source, _ in renames] + [drop.source for drop in drops],
            [target for _, target in renames] + [fill.target for fill in fills],
        )
        return cls(
            name,
            dict(renames),
            {drop.source: drop for drop in drops},
            {fill.target: fill for fill in fills},
            shapes,
            tuple(edits),
            dtypes,
            skips,
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

        Drops have no inverse: what was dropped must come from elsewhere, so that a table with drops leads back only
        to the tensors it kept.
        """
        drops = {key: fill.inverse for key, fill in self.fills.items()}
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
        _refuse_repeated(
            name,
            [source for table in (ours, other) for source in (*table.renames, *table.drops)],
            [target for table in (ours, other) for target in table.shapes],
        )
        return Table(
            name,
            {**ours.renames, **other.renames},
            {**ours.drops, **other.drops},
            {**ours.fills, **other.fills},
            {**ours.shapes, **other.shapes},
            ours.edits + other.edits,
            {**ours.dtypes, **other.dtypes},
            {**ours.skips, **other.skips},
        )

    def rename_key(self, key: str) -> str | None:
        """Translate one source key; `None` for a key that is dropped.

        Raises:
            PlanError: `unexpected-tensor`.
        """
        if key in self.renames:
            return self.renames[key]
        if key in self.drops:
            return None
        raise PlanError(f"table {self.name!r} does not know {key}", code="unexpected-tensor", key=key)

    def map_state_dict(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Translate the keys of a state_dict; the values are handed on as they are, dropped ones left out.

        Args:
            state_dict: source keys with tensors of any kind. Every one must be known, and none may be missing.

        Returns:
            The tensors under their target names, in the table's order. What the table fills is not among them.

        Raises:
            PlanError: `unexpected-tensor` and `missing-tensor`, every one of them.
        """
        wanted = {*self.renames, *(key for key, drop in self.drops.items() if not drop.optional)}
        problems = [
            Problem("unexpected-tensor", key, "has no place in the model") for key in state_dict if not self._knows(key)
        ]
        problems += [Problem("missing-tensor", key, "is not in the state_dict") for key in wanted - set(state_dict)]
        if problems:
            raise PlanError(f"{len(problems)} keys do not fit table {self.name!r}", code="keys", problems=problems)
        return {target: state_dict[source] for source, target in self.renames.items()}

    def _knows(self, key: str) -> bool:
        return key in self.renames or key in self.drops


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion that was proved complete: each source tensor is renamed or dropped, each target tensor has an origin.

    Args:
        table: the table it follows.
        source: the checkpoint's tensors.
        target: the tensors to write, with the dtype each will have before any conversion.
    """

    table: Table
    source: Mapping[str, TensorSpec]
    target: Mapping[str, TensorSpec]

    @property
    def renames(self) -> Mapping[str, str]:
        """Source key -> target key."""
        return self.table.renames

    @property
    def drops(self) -> tuple[Drop, ...]:
        """The source tensors that are left out, those that are there."""
        return tuple(drop for key, drop in self.table.drops.items() if key in self.source)

    @property
    def fills(self) -> tuple[Fill, ...]:
        """The target tensors that a rule makes."""
        return tuple(self.table.fills.values())


def plan(table: Table, source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec] | None = None) -> Plan:
    """Prove that a table converts a source completely. Pure: no tensor is needed.

    Args:
        table: the table.
        source: the checkpoint's inventory.
        target: the target's inventory where another authority than the table has one, such as a transformers model on
            the meta device; by default the table's own.

    Returns:
        The plan.

    Raises:
        PlanError: every `unexpected-tensor`, `missing-tensor`, `unfilled-target`, `unknown-target`, `shape` and `dtype` at once.

    Example:
        >>> table = Table.build("toy", [Rename("proj.bias", "lm_head.bias", "vocab")], {}, {"vocab": 32})
        >>> plan(table, {"proj.bias": TensorSpec("proj.bias", (32,), "F32")}).renames
        {'proj.bias': 'lm_head.bias'}
    """
    wanted = table.target if target is None else target
    problems = [
        Problem("unexpected-tensor", key, f"has no place in the model; its shape is {spec.shape}")
        for key, spec in source.items()
        if key not in table.renames and key not in table.drops
    ]
    problems += [
        Problem("missing-tensor", key, "the checkpoint has no such tensor" + _expected(spec.shape))
        for key, spec in table.source.items()
        if key not in source
    ]
    problems += [Problem("unfilled-target", key, "no rule fills it") for key in wanted if key not in table.shapes]
    problems += [
        Problem("unknown-target", key, "the target has no such tensor") for key in table.shapes if key not in wanted
    ]
    for key, target_key in table.renames.items():
        if key in source and target_key in wanted:
            problems += _disagreements(source[key], wanted[target_key], table, target_key)
    for key, drop in table.drops.items():
        if key in source and drop.shape and source[key].shape != tuple(map(int, drop.shape.split())):
            problems.append(Problem("shape", key, f"source {source[key].shape}, the settings say ({drop.shape})"))
    if problems:
        raise PlanError(
            f"{len(problems)} problems make a complete conversion impossible; nothing was written",
            code="incomplete",
            problems=problems,
        )
    dtypes = {target_key: source[key].dtype for key, target_key in table.renames.items()}
    default = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else ""
    made = {key: TensorSpec(key, table.shapes[key], dtypes.get(key, default)) for key in table.shapes}
    return Plan(table, dict(source), made)


def _expected(shape: tuple[int, ...]) -> str:
    """State a shape, unless it was to be read off the tensor that is not there."""
    return "" if 0 in shape else f"; shape {shape} was expected"


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


def _grid(rule: Rule, axes: Axes) -> Iterable[dict[str, object]]:
    text = rule.target if isinstance(rule, Fill) else rule.source
    names = list(dict.fromkeys(_AXIS.findall(text)))
    for values in itertools.product(*(axes[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def _shape(names: str, dims: Dims) -> tuple[int, ...]:
    return tuple(int(name) if name.isdigit() else dims[name] for name in names.split())


def _refuse_repeated(name: str, sources: Iterable[str], targets: Iterable[str]) -> None:
    problems = [*_repeated("duplicate-source", sources), *_repeated("duplicate-target", targets)]
    if problems:
        raise PlanError(f"table {name!r} contradicts itself", code=problems[0].code, problems=problems)


def _repeated(code: str, keys: Iterable[str]) -> list[Problem]:
    return [Problem(code, key, f"{count} rules name it") for key, count in Counter(keys).items() if count > 1]


def _disagreements(source: TensorSpec, target: TensorSpec, table: Table, key: str) -> list[Problem]:
    problems = []
    if source.shape != table.source_shape(key):
        stated = table.source_shape(key)
        problems.append(Problem("shape", source.name, f"source {source.shape}, the settings say {stated}"))
    if target.shape != table.shapes[key]:
        problems.append(Problem("shape", target.name, f"source {source.shape}, target {target.shape}"))
    dtype = table.dtypes.get(key, "")
    if source.dtype not in (("", dtype) if dtype else ("", *FLOATS)):
        expected = dtype or "a floating point type"
        problems.append(Problem("dtype", source.name, f"source {source.dtype}, {expected} was expected"))
    elif target.dtype and source.dtype and target.dtype != source.dtype:
        problems.append(Problem("dtype", target.name, f"source {source.dtype}, target {target.dtype}"))
    return problems
