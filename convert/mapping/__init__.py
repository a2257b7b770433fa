"""Names and shapes of fairseq and Hugging Face models, translated in both directions; importable by other scripts.

Standard library only.

Example:
    >>> shapes = {"layer_norm.weight": (512,)}  # of a whole fairseq state_dict: {name: tensor.shape, ...}
    >>> from convert.mapping import map_state_dict  # map_state_dict(state_dict) gives Hugging Face's names
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from convert.mapping.rules import Drop, Edit, Fill, Plan, Rename, Table, TensorSpec, plan, under
from convert.mapping.wav2vec2 import Layout, infer_layout, table

T = TypeVar("T")
__all__ = ["Drop", "Edit", "Fill", "Layout", "Plan", "Rename", "Table", "TensorSpec", "infer_layout", "map_state_dict"]
__all__ += ["plan", "rename_key", "table", "under"]


def map_state_dict(state_dict: Mapping[str, T], head: str = "") -> dict[str, T]:
    """Rename a fairseq wav2vec 2.0 state_dict to Hugging Face's keys; tensors are handed on as they are.

    Args:
        state_dict: fairseq's `checkpoint["model"]`; its values only need a `shape`.
        head: `ctc`, `pretraining` or `encoder`; by default what the state_dict is.

    Returns:
        The same tensors under the keys of `Wav2Vec2ForCTC`, `Wav2Vec2ForPreTraining` or `Wav2Vec2Model`.

    Raises:
        PlanError: every key that is unknown or missing, and every tensor that a rule would have to make.
    """
    shapes: dict[str, Any] = {key: getattr(value, "shape", value) for key, value in state_dict.items()}
    return table(infer_layout(shapes), head).map_state_dict(state_dict)


def rename_key(key: str, shapes: Mapping[str, tuple[int, ...]], head: str = "") -> str | None:
    """Translate one key of a fairseq wav2vec 2.0 state_dict.

    Args:
        key: fairseq's name.
        shapes: the names and shapes of the whole state_dict: what a key means depends on the others.
        head: as for `map_state_dict`.

    Returns:
        Hugging Face's name, or `None` for a tensor that is dropped.

    Raises:
        PlanError: `unmapped-source`.
    """
    return table(infer_layout(shapes), head).rename_key(key)
