"""The planner, which proves that a table converts a checkpoint completely. Standard library only: no tensor is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from convert.errors import PlanError, Problem
from convert.rules import FLOATS, Drop, Fill, Table, TensorSpec


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
