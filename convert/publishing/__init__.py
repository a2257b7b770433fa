"""Puts a verified model on the Hub: gate, card, one commit."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "publish": "convert.publishing.run",
    "Published": "convert.publishing.run",
    "Stated": "convert.publishing.facts",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
