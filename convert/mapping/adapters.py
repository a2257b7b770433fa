"""The adapters in wav2vec 2.0's layers (`fairseq.models.wav2vec.wav2vec2.AdapterFast`), one for each language, one line a tensor.

fairseq stacks the adapters of all languages in one tensor. Here each is a tensor of its own, named by its index as Python
would (`...adapter_layer.W_a[2]`), so that a table accounts for every one of them; `unstack` makes those names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from convert.mapping import wav2vec2
from convert.mapping.family import Family, Shapes
from convert.mapping.rules import Drop, Edit, Fill, Rename, Rule, Table, under

# fmt: off
ADAPTER = (
    Rename("encoder.layers.{adapted}.adapter_layer.ln_W", "encoder.layers.{adapted}.adapter_layer.norm.weight",     "hidden"),
    Rename("encoder.layers.{adapted}.adapter_layer.ln_b", "encoder.layers.{adapted}.adapter_layer.norm.bias",       "hidden"),
    Rename("encoder.layers.{adapted}.adapter_layer.W_a",  "encoder.layers.{adapted}.adapter_layer.linear_1.weight", "adapter hidden"),
    Rename("encoder.layers.{adapted}.adapter_layer.b_a",  "encoder.layers.{adapted}.adapter_layer.linear_1.bias",   "adapter"),
    Rename("encoder.layers.{adapted}.adapter_layer.W_b",  "encoder.layers.{adapted}.adapter_layer.linear_2.weight", "hidden adapter"),
    Rename("encoder.layers.{adapted}.adapter_layer.b_b",  "encoder.layers.{adapted}.adapter_layer.linear_2.bias",   "hidden"),
)
_NOTHING = "fairseq has no adapter in this layer (adp_trf_idx), transformers has; made of zeros it adds zero"
NO_ADAPTER = (
    Fill("encoder.layers.{bare}.adapter_layer.norm.{p}",          "zeros", _NOTHING, "hidden"),
    Fill("encoder.layers.{bare}.adapter_layer.linear_1.weight",   "zeros", _NOTHING, "adapter hidden"),
    Fill("encoder.layers.{bare}.adapter_layer.linear_1.bias",     "zeros", _NOTHING, "adapter"),
    Fill("encoder.layers.{bare}.adapter_layer.linear_2.weight",   "zeros", _NOTHING, "hidden adapter"),
    Fill("encoder.layers.{bare}.adapter_layer.linear_2.bias",     "zeros", _NOTHING, "hidden"),
)
# fmt: on
_OTHER = "belongs to another language"
_STACKED = re.compile(r"encoder\.layers\.(\d{1,3})\.adapter_layer\.(ln_W|ln_b|W_a|b_a|W_b|b_b)(?:\[(\d{1,6})\])?")
MOST = 500_000  # adapters that are told apart: those of 1,700 languages in 48 layers
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Layout(wav2vec2.Layout):
    """The geometry of a wav2vec 2.0 model with adapters.

    Args:
        adapter: `adp_dim`, the width inside an adapter.
        adapted: the layers that have one.
        rows: `adp_num`, the adapters that are stacked in each.
        row: the one that is taken.
    """

    adapter: int
    adapted: tuple[int, ...]
    rows: int
    row: int


def table(layout: Layout, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one model that speaks one language; see `convert.mapping.wav2vec2.table`."""
    rules = [*wav2vec2.encoder_rules(layout), *_of_row(layout.row), *NO_ADAPTER]
    for other in range(layout.rows):
        if other != layout.row:
            rules += [Drop(rule.source, _OTHER, rule.shape) for rule in _of_row(other)]
    return wav2vec2.assemble(
        replace(layout, family="wav2vec2"),
        head,
        edits,
        encoder=rules,
        heads=wav2vec2.HEADS,
        drops=wav2vec2.DROPS,
        axes=_axes(layout),
        dims=_dims(layout),
    )


def language_table(layout: Layout, row: int) -> Table:
    """Make the table of what belongs to one language alone: its adapters and its head, as `load_adapter` wants them.

    Args:
        layout: the model's geometry, with the rows of this language's head.
        row: the language's index among the adapters.
    """
    rules: list[Rule] = [*under([*_of_row(row), *NO_ADAPTER], source=wav2vec2.PREFIXES["ctc"], target="wav2vec2.")]
    return Table.build("wav2vec2 language", [*rules, *wav2vec2.CTC_HEAD], _axes(layout), _dims(layout))


def _of_row(row: int) -> list[Rename]:
    return [replace(rule, source=f"{rule.source}[{row}]") for rule in ADAPTER]


def _axes(layout: Layout) -> dict[str, tuple[object, ...]]:
    bare = tuple(layer for layer in range(layout.layers) if layer not in layout.adapted)
    return {**wav2vec2.axes(layout), "adapted": layout.adapted, "bare": bare}


def _dims(layout: Layout) -> dict[str, int]:
    return {**wav2vec2.dims(layout), "adapter": layout.adapter}


def unstack(
    values: Mapping[str, T], shape: Callable[[T], tuple[int, ...]], take: Callable[[T, int], T]
) -> dict[str, T]:
    """Give every adapter of a state_dict a name of its own; everything else is handed on.

    Args:
        values: fairseq's keys with tensors of any kind.
        shape: says the shape of one.
        take: takes one along the first axis.

    Example:
        >>> name = "encoder.layers.0.adapter_layer.b_a"
        >>> unstack({name: (2, 16), "mask_emb": (768,)}, lambda shape: shape, lambda shape, _: shape[1:])
        {'encoder.layers.0.adapter_layer.b_a[0]': (16,), 'encoder.layers.0.adapter_layer.b_a[1]': (16,), 'mask_emb': (768,)}
    """
    made: dict[str, T] = {}
    for name, value in values.items():
        rows = stacked(name, shape(value))
        if len(made) + rows > MOST:  # a small file may name one storage as many adapters; what stays whole is refused
            rows = 0
        made |= {f"{name}[{row}]": take(value, row) for row in range(rows)} if rows else {name: value}
    return made


def is_unstacked(name: str) -> bool:
    """Say whether a name is one that `unstack` makes, and no checkpoint has."""
    found = _STACKED.search(name)
    return found is not None and found[3] is not None


def stacked(name: str, shape: tuple[int, ...]) -> int:
    """Count the adapters in a tensor; none in those that are no stack."""
    found = _STACKED.search(name)
    whole = found is not None and found.end() == len(name) and not found[3] and len(shape) > 1
    return shape[0] if whole else 0


def stack(names: Iterable[str]) -> dict[str, list[str]]:
    """Find fairseq's names again: each with the names that `unstack` made of it, in order, or with none.

    Example:
        >>> name = "encoder.layers.0.adapter_layer.b_a"
        >>> stack([name + "[1]", name + "[0]", "mask_emb"])
        {'encoder.layers.0.adapter_layer.b_a': ['encoder.layers.0.adapter_layer.b_a[0]', 'encoder.layers.0.adapter_layer.b_a[1]'], 'mask_emb': []}
    """
    found: dict[str, list[str]] = {}
    for name in names:
        match = _STACKED.search(name)
        rows = found.setdefault(name.removesuffix(f"[{match[3]}]") if match else name, [])
        if match:
            rows.append(name)
    return {name: sorted(rows, key=lambda row: int(row.rpartition("[")[2][:-1])) for name, rows in found.items()}


def infer_layout(shapes: Shapes) -> Layout:
    """Read the geometry of a wav2vec 2.0 model with adapters off its names and shapes; see `convert.mapping.infer_layout`.

    Raises:
        PlanError: `missing-source`, when it is no wav2vec 2.0 model.
    """
    shapes = unstack(shapes, lambda shape: shape, lambda shape, _: shape[1:])
    plain = wav2vec2.infer_layout(shapes)
    found = [match for key in shapes if (match := _STACKED.search(key))]
    narrow = [shape[0] for key, shape in shapes.items() if ".adapter_layer.b_a[" in key and len(shape) == 1]
    known = {field.name: getattr(plain, field.name) for field in fields(plain)}
    return Layout(
        **known | {"family": FAMILY.name},
        adapter=narrow[0] if narrow else 0,
        adapted=tuple(sorted({int(match[1]) for match in found})),
        rows=max((int(match[3] or 0) for match in found), default=-1) + 1,
        row=0,
    )


FAMILY = Family("wav2vec2_adapter", r"\.adapter_layer\.", infer_layout, table)
