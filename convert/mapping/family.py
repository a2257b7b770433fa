"""What a family of models offers to the mapping: its geometry, read off names and shapes, and its table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.mapping.rules import Edit, Table

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Args:
        name: the target's base prefix, such as `hubert`; what a layout's field `family` says.
        mark: a regular expression that is found in a key of this family's checkpoints.
        infer: reads the geometry off names and shapes.
        build: makes the table of (layout, head, edits).
    """

    name: str
    mark: str
    infer: Callable[[Shapes], Any]
    build: Callable[[Any, str, Iterable[Edit]], Table]

    def knows(self, shapes: Shapes) -> bool:
        """Say whether a state_dict may be of this family, by its names alone."""
        pattern = re.compile(self.mark)
        return any(pattern.search(key) for key in shapes)
