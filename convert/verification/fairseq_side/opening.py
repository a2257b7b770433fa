"""Opening a reference: fairseq's model, built from settings and filled with a checkpoint's tensors."""

from __future__ import annotations

from typing import Any

from .building import build, no_random_numbers, parts_of
from .importing import CannotBuildError
from .reference import Reference
from .weights import Weights


def open_reference(request: Any) -> Reference:
    """Build fairseq's model from a checkpoint's settings and fill it with the checkpoint's tensors, strictly.

    Args:
        request: `settings` (see `build`; nothing in them is evaluated, imported, opened or resolved), `files` and `tensors`
            (see `Weights`), `symbols` (the dictionary, or an empty list), `post_process`, `device`; of a model with
            adapters `languages` (name -> index among them), `groups` (name -> the language's `tensors` and `symbols`) and
            `language` (the one that is set unless told otherwise).

    Raises:
        CannotBuildError: fairseq is absent, or cannot build this model; or the file is not the one that was read.
    """
    settings = request["settings"]
    runs = parts_of(settings)[1]
    library, patches = runs.library()
    ignored: list[str] = []
    weights = Weights(request["files"])
    symbols = len(request["symbols"])
    if request["groups"]:  # MMS: the model has a head of its own, that the language's replaces
        symbols = request["tensors"]["w2v_encoder.proj.bias"][1][0][2][0]
    try:
        with no_random_numbers():
            model = build(settings, symbols, ignored, patches)
        patches.append("in float64: %s compute in float64, to measure floors" % runs.islands)
        info = {
            "fairseq": runs.version % getattr(library, "__version__", "unknown"),
            "settings": "fairseq-to-hf's reader",
            "ignored_settings": ignored,
            "patches": patches,
        }
        reference: Reference = runs(model, request, weights, info)
        reference.fill(weights.read(request["tensors"]))
        reference.set_language("")
    except CannotBuildError:
        raise
    except Exception as error:
        reason = ("%s: %s" % (type(error).__name__, error)).split("\n")
        raise CannotBuildError("fairseq cannot build the model: %s" % " ".join(line.strip() for line in reason[:3]))
    return reference
