"""Names and shapes of fairseq and Hugging Face models, translated in both directions; importable by other scripts.

Standard library only.

Example:
    >>> shapes = {"layer_norm.weight": (512,)}  # of a whole fairseq state_dict: {name: tensor.shape, ...}
    >>> from convert.mapping import map_state_dict  # map_state_dict(state_dict) gives Hugging Face's names
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from convert.checkpoint.stacks import stack, unstack
from convert.errors import PlanError
from convert.families import FAMILIES
from convert.families.base import Family
from convert.families.encoder import Layout
from convert.planner import Plan, plan
from convert.rules import Drop, Edit, Fill, Rename, Table, TensorSpec, add_prefix

T = TypeVar("T")
under = add_prefix  # its name until 0.2
__all__ = ["FAMILIES", "Drop", "Edit", "Family", "Fill", "Layout", "Plan", "Rename", "Table", "TensorSpec"]
__all__ += ["add_prefix", "infer_layout", "map_state_dict", "plan", "rename_key", "table", "under"]


def infer_layout(source: Mapping[str, TensorSpec] | Mapping[str, tuple[int, ...]], family: str = "") -> Any:
    """Read the geometry off the names and shapes of a fairseq state_dict.

    This is enough to rename tensors. It is not enough for a configuration: strides, heads, norm placement, activation
    and normalisation are not in the shapes.

    Args:
        source: fairseq's keys with their specs or shapes.
        family: a key of `FAMILIES`, such as `wav2vec2`; by default what the names look like. Fine-tuned models of some
            families look like a fine-tuned wav2vec 2.0: name theirs, if only to get Hugging Face's prefix right.

    Returns:
        The family's layout, for `table`.

    Raises:
        PlanError: `missing-tensor`, when it is not such a model; `unknown-family`.
    """
    shapes = {key: spec.shape if isinstance(spec, TensorSpec) else tuple(spec) for key, spec in source.items()}
    if family and family not in FAMILIES:
        raise PlanError(
            f"no such family: {family}", code="unknown-family", key=family, hint=f"known: {', '.join(FAMILIES)}"
        )
    known = list(FAMILIES.values())
    found = FAMILIES.get(family) or next((one for one in known if one.knows(shapes)), known[-1])
    return found.infer(shapes)


def table(layout: Any, head: str = "", edits: Iterable[Edit] = ()) -> Table:
    """Make the table of one model.

    Args:
        layout: the model's geometry, as `infer_layout` returns it.
        head: `encoder` for the model without its head; by default what the checkpoint is.
        edits: changes of single rows, see `Edit`.

    Raises:
        PlanError: `no-head`, when the checkpoint does not have the head that was asked for.
    """
    return FAMILIES[layout.family].table(layout, head, edits)


def map_state_dict(state_dict: Mapping[str, T], head: str = "", family: str = "") -> dict[str, T]:
    """Rename a fairseq state_dict to Hugging Face's keys; tensors are handed on as they are.

    Args:
        state_dict: fairseq's `checkpoint["model"]`; its values only need a `shape`.
        head: as for `table`.
        family: as for `infer_layout`.

    Returns:
        The same tensors under the keys of transformers' class, such as `Wav2Vec2ForCTC`.

    Raises:
        PlanError: every key that is unknown or missing, and every tensor that a rule would have to make.
    """
    single = unstack(state_dict, _shape, lambda stacked, row: stacked[row])  # type: ignore[index]
    return table(infer_layout({key: _shape(value) for key, value in single.items()}, family), head).map_state_dict(
        single
    )


def rename_key(key: str, shapes: Mapping[str, tuple[int, ...]], head: str = "", family: str = "") -> str | None:
    """Translate one key of a fairseq state_dict.

    Args:
        key: fairseq's name.
        shapes: the names and shapes of the whole state_dict: what a key means depends on the others.
        head: as for `table`.
        family: as for `infer_layout`.

    Returns:
        Hugging Face's name, or `None` for a tensor that is dropped.

    Raises:
        PlanError: `unexpected-tensor`.
    """
    single = stack(unstack({key: shapes.get(key, ())}, tuple, lambda shape, _: shape))[key]
    return table(infer_layout(shapes, family), head).rename_key(single[0] if single else key)


def _shape(value: Any) -> Any:
    return getattr(value, "shape", value)
