"""Loading with plain transformers: quiet, without code from the repository, and completely or not at all."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.errors import ConvertError, MismatchError, Problem
from convert.reading import check_folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep other libraries' warnings, log messages and progress bars off stderr, and drop log handlers that they add."""
    before, root = logging.root.manager.disable, logging.root
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        root.handlers[:] = handlers
        root.setLevel(level)


def load(part: Any, source: str | Path, *, status: int = 2, **options: Any) -> Any:
    """Load a configuration, tokenizer, feature extractor, processor or model.

    Args:
        part: the transformers class, such as `AutoTokenizer`.
        source: a directory, or the name of a repository on the Hub.
        status: the exit status of a failure.
        options: of its `from_pretrained`.

    Raises:
        ConvertError: `load`: transformers cannot load it.
    """
    local = isinstance(source, Path)
    if isinstance(source, Path):
        check_folder(source)
    with trying(_name(source), f"{part.__name__} cannot load it", status=status), quiet():
        return part.from_pretrained(source, local_files_only=local, trust_remote_code=False, **options)


def _name(source: str | Path) -> str:
    return source.name if isinstance(source, Path) else source


@contextlib.contextmanager
def trying(name: str, what: str, *, status: int = 2) -> Iterator[None]:
    """Turn whatever transformers raises on a model's account into one error.

    Args:
        name: the model's name.
        what: what cannot be done, to follow the name.
        status: the exit status.

    Raises:
        ConvertError: `load`.
    """
    import transformers

    try:
        yield
    except (ConvertError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        hint = f"this is transformers {transformers.__version__}; a newer one may: pip install -U transformers"
        raise ConvertError(f"{name}: {what}: {reason}", code="load", key=name, status=status, hint=hint) from error


def load_model(part: Any, source: str | Path, *, status: int = 2, **options: Any) -> Any:
    """Load a model as `load` does, and refuse what transformers would fill with random numbers or leave out with a warning only.

    Raises:
        MismatchError: `load`: a tensor is missing, unexpected or of another shape; all of them are listed.
        ConvertError: as `load`.
    """
    # transformers 5 raises where shapes differ, and names no tensor
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = load(part, source, status=status, **options)
    problems = [
        *(Problem("missing-keys", key, "not in the weights file") for key in found["missing_keys"]),
        *(Problem("unexpected-keys", key, "not in the model's class") for key in found["unexpected_keys"]),
        *(
            Problem("mismatched-keys", key, f"shape: weights file {tuple(stored)}, model {tuple(expected)}")
            for key, stored, expected in found["mismatched_keys"]
        ),
    ]
    if problems:
        name = _name(source)
        message, hint = f"{name}: its tensors are not those of {type(model).__name__}", "convert the checkpoint again"
        raise MismatchError(message, code="load", key=name, problems=problems, status=status, hint=hint)
    return model
