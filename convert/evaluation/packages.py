"""Imports the packages that only evaluation needs, and says which to install when one is missing."""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from convert.errors import ConvertError


def require(package: str, extra: str = "evaluate") -> Any:
    """Import a package, or say which extra of this distribution brings it.

    Args:
        package: the name to import.
        extra: the extra of `fairseq-to-hf` that installs it.

    Raises:
        ConvertError: code `missing-package`, naming the package and the command that installs it.

    Example:
        >>> require("json").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise ConvertError(
            f"{missing} is not installed; evaluation needs it",
            code="missing-package",
            key=missing,
            hint=f"pip install 'fairseq-to-hf[{extra}]'",
        ) from error


@contextmanager
def silence() -> Iterator[None]:
    """Keep loading bars and warnings of Hugging Face's libraries out of the output: what they say is checked here."""
    loggers = [logging.getLogger(name) for name in ("transformers", "datasets", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
