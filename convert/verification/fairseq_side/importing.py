"""Importing fairseq 0.10 to main with newer versions of Python and numpy."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from typing import Any

import numpy


class CannotBuildError(Exception):
    """fairseq is absent, or cannot build the model."""


@contextlib.contextmanager
def numpy_aliases(patches: list[str]) -> Any:
    """`numpy.float` and its like left numpy in 1.24; fairseq 0.10 and 0.12 name them while they are imported."""
    gone = {"float": float, "int": int, "bool": bool, "object": object}
    added = [name for name in gone if name not in vars(numpy)]
    if added:
        patches.append("numpy.%s named while fairseq is imported" % ", numpy.".join(added))
    for name in added:
        setattr(numpy, name, gone[name])
    try:
        yield
    finally:
        for name in added:
            delattr(numpy, name)


@contextlib.contextmanager
def hashable_dataclasses() -> Any:
    """Python 3.11 takes no unhashable default in a dataclass; fairseq 0.12's configurations are such defaults."""
    original = dataclasses.dataclass

    def patched(cls: Any = None, **options: Any) -> Any:
        def make(made: Any) -> Any:
            ours = made.__module__.split(".")[0] == "fairseq"
            return original(made, **(dict(options, unsafe_hash=True) if ours else options))

        return make if cls is None else make(cls)

    dataclasses.dataclass = patched
    try:
        yield
    finally:
        dataclasses.dataclass = original


def import_fairseq() -> tuple[Any, list[str]]:
    """Import fairseq; return it and the names of the patches it took.

    Raises:
        CannotBuildError: it cannot be imported, with the reason.
    """
    if "fairseq" in sys.modules:
        return sys.modules["fairseq"], []
    patches: list[str] = []
    try:
        with numpy_aliases(patches):
            try:
                import fairseq
            except ValueError as error:
                if "mutable default" not in str(error):
                    raise
                for name in [name for name in sys.modules if name.split(".")[0] == "fairseq"]:
                    del sys.modules[name]
                with hashable_dataclasses():
                    import fairseq
                patches.append("dataclasses made hashable while fairseq is imported: Python 3.11 refuses its defaults")
            import fairseq.models.wav2vec.wav2vec2_asr
            import fairseq.tasks.audio_pretraining
    except Exception as error:
        raise CannotBuildError("fairseq cannot be imported here: %s: %s" % (type(error).__name__, error))
    logging.getLogger("fairseq").setLevel(logging.ERROR)
    return fairseq, patches
