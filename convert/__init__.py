"""Turn fairseq speech checkpoints into Hugging Face models, and prove that they are the same."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that holds it; imported when it is first used, so that `import convert` costs nothing.
_PUBLIC = {
    "Checkpoint": "convert.checkpoint",
    "open_checkpoint": "convert.checkpoint",
    "ConvertError": "convert.errors",
    "CheckpointError": "convert.errors",
    "PlanError": "convert.errors",
    "MismatchError": "convert.errors",
    "convert": "convert.package",
    "convert_all": "convert.package",
    "plan": "convert.package",
    "compare_weights": "convert.package",
    "restore": "convert.restoration",
    "verify": "convert.verification",
    "record": "convert.verification",
    "assert_identical": "convert.verification",
    "evaluate": "convert.evaluation",
    "Evaluation": "convert.evaluation",
    "publish": "convert.publishing",
    "Stated": "convert.publishing",
    "fetch": "convert.fetching",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
