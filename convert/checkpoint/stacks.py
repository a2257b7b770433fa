"""The adapters of fairseq's wav2vec 2.0 layers, which it stacks for all languages in one tensor, as a tensor each.

Each is named by its index, as Python would: `...adapter_layer.W_a[2]`. So a table accounts for every one of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

STACKED = re.compile(r"encoder\.layers\.(\d{1,3})\.adapter_layer\.(ln_W|ln_b|W_a|b_a|W_b|b_b)(?:\[(\d{1,6})\])?")
MOST = 500_000  # adapters that are told apart: those of 1,700 languages in 48 layers
T = TypeVar("T")


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
        # each language has the same names
        made |= {sys.intern(f"{name}[{row}]"): take(value, row) for row in range(rows)} if rows else {name: value}
    return made


def is_unstacked(name: str) -> bool:
    """Say whether a name is one that `unstack` makes, and no checkpoint has."""
    found = STACKED.search(name)
    return found is not None and found[3] is not None


def stacked(name: str, shape: tuple[int, ...]) -> int:
    """Count the adapters in a tensor; none in those that are not a stack."""
    found = STACKED.search(name)
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
        match = STACKED.search(name)
        rows = found.setdefault(name.removesuffix(f"[{match[3]}]") if match else name, [])
        if match:
            rows.append(name)
    return {name: sorted(rows, key=lambda row: int(row.rpartition("[")[2][:-1])) for name, rows in found.items()}
